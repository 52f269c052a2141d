//! The memory of a seed's process. A run asks for a small piece a few million times and lives for a fraction of a
//! second on one thread, so the allocator does as little as it can: pieces of a hundred sizes, a list of free ones for
//! each, and what is used once stays with the process. Twelve of a hundred instructions of a run were the C library's.
//!
//! Invariant: where a piece lies never decides what a run does, as addresses differ from process to process anyway.
//! Never linked into a product.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr::null_mut;

/// Pieces up to [`FINE_MOST`] are multiples of this, and all lie at such.
const STEP: usize = 16;
/// Tasks want to lie at multiples of this (two lines of the cache): such pieces have lists of their own.
const LINE: usize = 128;
/// What is larger and wants to lie so is the C library's.
const LINE_MOST: usize = 32 << 10;
/// Up to here sizes go in steps, above four of them double it.
const FINE_MOST: usize = 1024;
/// What is larger is the C library's.
const MOST: usize = 1 << 20;
const FINE: usize = FINE_MOST / STEP;
const SIZES: usize = FINE + 4 * (MOST / FINE_MOST).ilog2() as usize;
/// Asked of the kernel at a time, in huge pages where it has such.
const CHUNK: usize = 8 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// Which size a piece has that holds so many bytes.
const fn size_of(bytes: usize) -> (usize, usize) {
    if bytes <= FINE_MOST {
        let at = bytes.saturating_sub(1) / STEP;
        return (at, (at + 1) * STEP);
    }
    let last = bytes - 1;
    let log = last.ilog2() as usize;
    let quarter = last >> (log - 2);
    let doublings = log - FINE_MOST.ilog2() as usize;
    (FINE + 4 * doublings + quarter - 4, (quarter + 1) << (log - 2))
}

/// A free piece holds the next one of its list.
struct Free {
    next: *mut Free,
}

struct Heap {
    free: [*mut Free; SIZES],
    /// Of those that lie at multiples of [`LINE`].
    aligned: [*mut Free; LINE_MOST / LINE],
    /// What is left of the newest chunk.
    rest: *mut u8,
    left: usize,
}

thread_local! {
    // A piece that another thread gives back is that thread's from then on.
    static HEAP: UnsafeCell<Heap> = const {
        UnsafeCell::new(Heap {
            free: [null_mut(); SIZES],
            aligned: [null_mut(); LINE_MOST / LINE],
            rest: null_mut(),
            left: 0,
        })
    };
}

/// Hands out pieces of memory.
pub(crate) struct Memory;

/// Who has a piece, by its layout alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Home {
    /// The list of this number, of pieces of this size.
    Free(usize, usize),
    /// The same, among the aligned ones.
    Aligned(usize, usize),
    /// The C library.
    System,
}

fn home(layout: Layout) -> Home {
    let (size, align) = (layout.size(), layout.align());
    if align <= STEP && size <= MOST {
        let (at, size) = size_of(size);
        Home::Free(at, size)
    } else if align <= LINE && size <= LINE_MOST {
        let at = size.saturating_sub(1) / LINE;
        Home::Aligned(at, (at + 1) * LINE)
    } else {
        Home::System
    }
}

/// Runs `body` on this thread's heap, which it must not use by any other way meanwhile: it may not allocate.
fn with_heap<T>(body: impl FnOnce(&mut Heap) -> T) -> T {
    // SAFETY: the only reference to it, for the time of `body`; only this thread can reach it.
    HEAP.with(|heap| body(unsafe { &mut *heap.get() }))
}

/// Takes new memory from now on: what lies in the parent's pages would be copied page by page.
pub(crate) fn begin_anew() {
    with_heap(|heap| {
        heap.free = [null_mut(); SIZES];
        heap.aligned = [null_mut(); LINE_MOST / LINE];
        heap.left = 0;
    });
}

/// Takes the first piece of a list, if there is one.
fn pop(list: &mut *mut Free) -> Option<*mut u8> {
    let free = *list;
    if free.is_null() {
        return None;
    }
    // SAFETY: a piece in the list was given back, is as large as the list says, and was written by `push`.
    *list = unsafe { (*free).next };
    Some(free.cast())
}

fn push(list: &mut *mut Free, piece: *mut u8) {
    let free: *mut Free = piece.cast();
    // SAFETY: the piece is nobody's any more, at least 16 bytes long, and aligned to that.
    unsafe { (*free).next = *list };
    *list = free;
}

impl Heap {
    fn take(&mut self, at: usize, size: usize) -> *mut u8 {
        match pop(&mut self.free[at]) {
            Some(piece) => piece,
            None => self.carve(size, 0),
        }
    }

    fn take_aligned(&mut self, at: usize, size: usize) -> *mut u8 {
        match pop(&mut self.aligned[at]) {
            Some(piece) => piece,
            None => {
                let lost = self.rest.align_offset(LINE);
                self.carve(size, lost)
            }
        }
    }

    /// A piece of new memory, after so many bytes that are lost unless it takes a new chunk, which is aligned.
    fn carve(&mut self, size: usize, mut lost: usize) -> *mut u8 {
        if self.left < size + lost {
            if !self.grow() {
                return null_mut();
            }
            lost = 0;
        }
        // SAFETY: `left` bytes are there from `rest` on, and it is at least this sum.
        let piece = unsafe { self.rest.add(lost) };
        self.left -= size + lost;
        // SAFETY: as above.
        self.rest = unsafe { piece.add(size) };
        piece
    }

    /// A new chunk; what was left of the last one is lost.
    fn grow(&mut self) -> bool {
        let (rights, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: asks for memory at a place of the kernel's choice.
        let mapped = unsafe { libc::mmap(null_mut(), CHUNK + HUGE_PAGE, rights, kind, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        let start: *mut u8 = mapped.cast();
        // SAFETY: less than a huge page further, and that much more than the chunk was mapped.
        self.rest = unsafe { start.add(start.align_offset(HUGE_PAGE)) };
        self.left = CHUNK;
        #[cfg(target_os = "linux")]
        // SAFETY: advice about memory that was mapped above. Where it is not taken, pages are small.
        unsafe {
            libc::madvise(self.rest.cast(), CHUNK, libc::MADV_HUGEPAGE);
        }
        true
    }
}

// SAFETY: a piece is at least as long as its layout and aligned as it says; whose it is depends on the layout alone. A
// piece is in a list or in use, never both.
unsafe impl GlobalAlloc for Memory {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match home(layout) {
            Home::Free(at, size) => with_heap(|heap| heap.take(at, size)),
            Home::Aligned(at, size) => with_heap(|heap| heap.take_aligned(at, size)),
            // SAFETY: the caller's promise is the same.
            Home::System => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        match home(layout) {
            Home::Free(at, _) => with_heap(|heap| push(&mut heap.free[at], piece)),
            Home::Aligned(at, _) => with_heap(|heap| push(&mut heap.aligned[at], piece)),
            // SAFETY: by the same rule it came from there.
            Home::System => unsafe { System.dealloc(piece, layout) },
        }
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is not too large for the alignment.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (home(layout), home(new)) {
            // SAFETY: it came from there.
            (Home::System, Home::System) => return unsafe { System.realloc(piece, layout, new_size) },
            (old, new) if old == new => return piece,
            _ => {}
        }
        // SAFETY: two pieces that do not overlap, each as long as its layout says.
        unsafe {
            let moved = self.alloc(new);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(piece, layout.size().min(new_size));
                self.dealloc(piece, layout);
            }
            moved
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::chance::Stream;

    #[test]
    fn sizes_hold_what_they_are_for_and_rise() {
        let mut before = (0, 0);
        for bytes in 1..=MOST {
            let (at, size) = size_of(bytes);
            assert!(size >= bytes && size.is_multiple_of(STEP), "{bytes} in {size}");
            assert!(at == before.0 && size == before.1 || size > before.1, "{bytes}");
            assert!(
                size <= bytes + STEP || size <= bytes + bytes / 4,
                "{bytes} in {size}"
            );
            before = (at, size);
        }
        assert_eq!(before, (SIZES - 1, MOST));
        assert_eq!(size_of(0), size_of(1));
    }

    #[test]
    fn pieces_in_use_share_nothing_and_keep_what_they_hold() {
        let mut draw = Stream::new(1, "memory");
        let mut held: Vec<(*mut u8, Layout, u8)> = Vec::new();
        for turn in 0..20_000_u32 {
            let most = if draw.percent(2) { 2 * MOST as u64 } else { 3_000 };
            let bytes = usize::try_from(draw.between(1, most)).unwrap();
            let align = 1 << draw.below(9);
            let layout = Layout::from_size_align(bytes, align).unwrap();
            let mark = turn as u8;
            // SAFETY: what `alloc` gave is given back or moved once, with its layout, and used within it.
            unsafe {
                if held.len() > 200 || draw.percent(40) && !held.is_empty() {
                    let at = usize::try_from(draw.below(held.len() as u64)).unwrap();
                    let (piece, old, mark) = held.swap_remove(at);
                    assert!((0..old.size()).all(|byte| *piece.add(byte) == mark), "{old:?}");
                    if draw.percent(50) {
                        Memory.dealloc(piece, old);
                        continue;
                    }
                    let grown = Memory.realloc(piece, old, bytes);
                    let kept = old.size().min(bytes);
                    assert!(
                        (0..kept).all(|byte| *grown.add(byte) == mark),
                        "{old:?} to {bytes}"
                    );
                    let layout = Layout::from_size_align(bytes, old.align()).unwrap();
                    grown.write_bytes(mark, bytes);
                    held.push((grown, layout, mark));
                    continue;
                }
                let piece = Memory.alloc(layout);
                assert!(
                    !piece.is_null() && piece.addr().is_multiple_of(align),
                    "{layout:?}"
                );
                piece.write_bytes(mark, bytes);
                held.push((piece, layout, mark));
            }
        }
    }
}

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
    /// What is left of the newest chunk.
    rest: *mut u8,
    left: usize,
}

thread_local! {
    // A piece that another thread gives back is that thread's from then on.
    static HEAP: UnsafeCell<Heap> = const {
        UnsafeCell::new(Heap {
            free: [null_mut(); SIZES],
            rest: null_mut(),
            left: 0,
        })
    };
}

/// Hands out pieces of memory.
pub(crate) struct Memory;

/// Whether the C library has it.
fn is_foreign(layout: Layout) -> bool {
    layout.size() > MOST || layout.align() > STEP
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
        heap.left = 0;
    });
}

impl Heap {
    fn take(&mut self, at: usize, size: usize) -> *mut u8 {
        let free = self.free[at];
        if !free.is_null() {
            // SAFETY: a piece in the list was given back, is of this size or larger, and was written by `give`.
            self.free[at] = unsafe { (*free).next };
            return free.cast();
        }
        if self.left < size && !self.grow() {
            return null_mut();
        }
        let piece = self.rest;
        self.left -= size;
        // SAFETY: `left` bytes are there from `rest` on, and it was at least `size`.
        self.rest = unsafe { piece.add(size) };
        piece
    }

    fn give(&mut self, piece: *mut u8, at: usize) {
        let free: *mut Free = piece.cast();
        // SAFETY: the piece is nobody's any more, at least 16 bytes long, and aligned to that.
        unsafe { (*free).next = self.free[at] };
        self.free[at] = free;
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

// SAFETY: a piece is at least as long as its layout and aligned to 16 bytes; larger alignments and sizes are the
// system's, by a rule that depends on the layout alone. A piece is in a list or in use, never both.
unsafe impl GlobalAlloc for Memory {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_foreign(layout) {
            // SAFETY: the caller's promise is the same.
            return unsafe { System.alloc(layout) };
        }
        let (at, size) = size_of(layout.size());
        with_heap(|heap| heap.take(at, size))
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        if is_foreign(layout) {
            // SAFETY: by the same rule it came from there.
            return unsafe { System.dealloc(piece, layout) };
        }
        let (at, _) = size_of(layout.size());
        with_heap(|heap| heap.give(piece, at));
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is not too large for the alignment.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (is_foreign(layout), is_foreign(new)) {
            // SAFETY: it came from there.
            (true, true) => return unsafe { System.realloc(piece, layout, new_size) },
            (false, false) if size_of(layout.size()) == size_of(new_size) => return piece,
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
            let align = 1 << draw.below(7);
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

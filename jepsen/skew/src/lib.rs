//! A preload shim that shows a process another wall clock: `LD_PRELOAD=libjepsen_skew.so JEPSEN_SKEW=PAGE palyrad ...`.
//!
//! It takes the place of the C library's functions that read `CLOCK_REALTIME` or wait for a moment of it, and of no
//! others: `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` stay true, because shifting them under a running process breaks
//! every absolute deadline that it has already handed to the kernel. Offset and drift come from a page of memory that
//! it shares with the harness ([`page`]), so a jump takes effect with the next call. Without a page, or with one that
//! is not ours or damaged, the machine's own time is shown.
//!
//! A wait until a moment of the wall clock is handed to the kernel as the true moment at which the shown clock will be
//! there; a jump during such a wait does not move it, which a real step of the clock would. Waits that name a duration
//! (all of Rust's, and `tokio`'s) are not touched. Never linked into a product or into the harness.
#![allow(unsafe_code, unreachable_pub)]
// The symbols are not exported from the crate's own tests, or they would replace the clock that runs these.
#![cfg_attr(test, allow(dead_code))]

pub mod page;
mod real;
mod waits;

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI64, AtomicPtr, AtomicU64, Ordering};

use libc::{c_int, clockid_t, time_t, timespec, timeval};

use page::{MAGIC, PAGE_LEN, Setting};

/// The words of [`page`], as they lie in memory.
#[repr(C)]
struct Page {
    magic: AtomicU64,
    offset: AtomicI64,
    drift: AtomicI64,
    since: AtomicI64,
    sum: AtomicU64,
    reads: AtomicU64,
    shown: AtomicI64,
    mapped: AtomicU64,
}

static PAGE: AtomicPtr<Page> = AtomicPtr::new(null_mut());

const SECOND: i64 = 1_000_000_000;
/// How often a setting that does not fit its sum is read again: the writer needs nanoseconds for 32 bytes.
const TRIES: u32 = 10_000;

/// Runs when the library is loaded, before the program's own code.
#[cfg_attr(not(test), used, unsafe(link_section = ".init_array"))]
static LOADED: extern "C" fn() = map_page;

extern "C" fn map_page() {
    let name = c"JEPSEN_SKEW";
    // SAFETY: the name ends with a zero; nobody else runs yet who could change the environment.
    let path = unsafe { libc::getenv(name.as_ptr()) };
    if path.is_null() {
        return;
    }
    // SAFETY: `path` is a string of the environment.
    let file = unsafe { libc::open(path, libc::O_RDWR | libc::O_CLOEXEC) };
    if file < 0 {
        return;
    }
    let page = map(file);
    // SAFETY: the descriptor is ours; a mapping outlives it.
    unsafe { libc::close(file) };
    let Some(page) = page else {
        return;
    };
    page.mapped.fetch_add(1, Ordering::Relaxed);
    PAGE.store(std::ptr::from_ref(page).cast_mut(), Ordering::Release);
}

fn map(file: c_int) -> Option<&'static Page> {
    // SAFETY: `stat` is plain data, for which zeros are a value, and is ours to be written.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: see above.
    if unsafe { libc::fstat(file, &raw mut stat) } != 0 || stat.st_size < PAGE_LEN as libc::off_t {
        return None;
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that is long enough.
    let memory: *mut c_void = unsafe { libc::mmap(null_mut(), PAGE_LEN, access, libc::MAP_SHARED, file, 0) };
    if memory == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: page-aligned, at least as long as `Page`, never unmapped, and all its words are atomics.
    let page = unsafe { &*memory.cast::<Page>() };
    (page.magic.load(Ordering::Relaxed) == MAGIC).then_some(page)
}

/// The page and its setting, if there is a fault to show.
fn fault() -> Option<(&'static Page, Setting)> {
    // SAFETY: what is stored there is a mapping that is never undone.
    let page = unsafe { PAGE.load(Ordering::Acquire).as_ref() }?;
    for _ in 0..TRIES {
        let setting = Setting {
            offset: page.offset.load(Ordering::Acquire),
            drift: page.drift.load(Ordering::Acquire),
            since: page.since.load(Ordering::Acquire),
        };
        if setting.sum() == page.sum.load(Ordering::Acquire) {
            return (setting.offset != 0 || setting.drift != 0).then_some((page, setting));
        }
        std::hint::spin_loop();
    }
    None
}

/// Replaces a true moment by the one that is shown.
fn skew(time: &mut timespec) {
    if let Some((page, setting)) = fault() {
        let shown = setting.shown(nanoseconds(time));
        page.reads.fetch_add(1, Ordering::Relaxed);
        page.shown.store(shown, Ordering::Relaxed);
        *time = moment(shown);
    }
}

fn nanoseconds(time: &timespec) -> i64 {
    time.tv_sec.saturating_mul(SECOND).saturating_add(time.tv_nsec)
}

fn moment(nanoseconds: i64) -> timespec {
    timespec {
        tv_sec: nanoseconds.div_euclid(SECOND),
        tv_nsec: nanoseconds.rem_euclid(SECOND),
    }
}

/// The wall clock as it is shown.
fn wall(clock: clockid_t) -> timespec {
    let mut time = moment(0);
    // SAFETY: `time` is ours to be written. The wall clock can always be read.
    unsafe { real::clock_gettime(clock, &raw mut time) };
    skew(&mut time);
    time
}

/// Stands in for the C library's `clock_gettime(2)`.
///
/// # Safety
/// As the original: `time` must be valid for a write.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    // SAFETY: passed on as promised by the caller.
    let result = unsafe { real::clock_gettime(clock, time) };
    if result == 0 && (clock == libc::CLOCK_REALTIME || clock == libc::CLOCK_REALTIME_COARSE) {
        // SAFETY: the original has just written there, and said so.
        skew(unsafe { &mut *time });
    }
    result
}

/// Stands in for the C library's `gettimeofday(2)`. The time zone has been empty for decades.
///
/// # Safety
/// As the original: `time` must be null or valid for a write, `zone` too.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn gettimeofday(time: *mut timeval, zone: *mut c_void) -> c_int {
    if !zone.is_null() {
        // SAFETY: the caller promises room for `struct timezone`, two integers.
        unsafe { zone.cast::<[c_int; 2]>().write([0, 0]) };
    }
    if !time.is_null() {
        let shown = wall(libc::CLOCK_REALTIME);
        // SAFETY: the caller promises room for it.
        unsafe {
            time.write(timeval {
                tv_sec: shown.tv_sec,
                tv_usec: shown.tv_nsec / 1000,
            });
        };
    }
    0
}

/// Stands in for the C library's `time(2)`, which is as coarse as the original.
///
/// # Safety
/// As the original: `time` must be null or valid for a write.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn time(time: *mut time_t) -> time_t {
    let shown = wall(libc::CLOCK_REALTIME_COARSE).tv_sec;
    if !time.is_null() {
        // SAFETY: the caller promises room for it.
        unsafe { time.write(shown) };
    }
    shown
}

/// Stands in for C11's `timespec_get`. Its only base that every system has is 1, the wall clock.
///
/// # Safety
/// As the original: `time` must be valid for a write.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn timespec_get(time: *mut timespec, base: c_int) -> c_int {
    if base != 1 {
        return 0;
    }
    // SAFETY: the caller promises room for it.
    unsafe { time.write(wall(libc::CLOCK_REALTIME)) };
    base
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_have_positive_nanoseconds() {
        let time = moment(-1);
        assert_eq!((time.tv_sec, time.tv_nsec), (-1, SECOND - 1));
        assert_eq!(nanoseconds(&time), -1);
    }

    #[test]
    fn without_a_page_there_is_no_fault() {
        assert!(fault().is_none());
        let mut now = moment(5);
        skew(&mut now);
        assert_eq!(nanoseconds(&now), 5);
        LOADED();
        assert!(fault().is_none(), "the test process names no page");
    }
}

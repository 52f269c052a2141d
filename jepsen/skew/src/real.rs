//! The functions whose place the shim takes: the next ones of their name in the order of the loader, usually the C
//! library's, which read the clock without entering the kernel.

use std::ffi::{CStr, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{c_int, clockid_t, timespec};

/// One of them, looked up at its first use.
pub(crate) struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Next {
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Next {
            name,
            found: AtomicPtr::new(null_mut()),
        }
    }

    /// Its address; null when nobody has it.
    pub(crate) fn address(&self) -> *mut c_void {
        let known = self.found.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name ends with a zero. Two threads that look at once find the same.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.found.store(found, Ordering::Relaxed);
        found
    }
}

static CLOCK_GETTIME: Next = Next::new(c"clock_gettime");

/// # Safety
/// As `clock_gettime(2)`.
pub(crate) unsafe fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let address = CLOCK_GETTIME.address();
    if address.is_null() {
        // SAFETY: the same call, straight to the kernel; 0 or -1 fits.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as c_int;
    }
    // SAFETY: the function of that name has this type.
    let next: extern "C" fn(clockid_t, *mut timespec) -> c_int = unsafe { std::mem::transmute(address) };
    next(clock, time)
}

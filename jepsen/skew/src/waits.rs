//! Waits until a moment of the wall clock: the moment that the process means is handed on as the true one.
//!
//! C++ programs wait this way (RocksDB does, with `pthread_cond_timedwait`). Without it, a clock that is an hour ahead
//! would make each of those waits an hour long.

use std::ffi::c_void;

use libc::{c_int, clockid_t, timespec};

use crate::real::Next;
use crate::{fault, moment, nanoseconds};

/// Deadlines below this count from the boot of a machine, not from 1970: a `pthread_cond_t` may be on either clock, and
/// does not say which. It is the year 2001; no machine is up for 31 years.
const EPOCH_FLOOR: i64 = 1_000_000_000;

/// The true moment that stands for `deadline`; `None` when it is to be handed on as it is.
fn true_deadline(deadline: *const timespec) -> Option<timespec> {
    // SAFETY: null, or a time that the caller of the C function promised to be readable.
    let deadline = unsafe { deadline.as_ref() }?;
    if deadline.tv_sec < EPOCH_FLOOR || !(0..1_000_000_000).contains(&deadline.tv_nsec) {
        return None;
    }
    let (_, setting) = fault()?;
    // A moment before 1970 is one that has passed, and the kernel refuses negative times.
    Some(moment(setting.real(nanoseconds(deadline)).max(0)))
}

/// A function of the C library whose last argument is a deadline, and whose answer is an error number.
macro_rules! wait_until {
    ($(#[$doc:meta])* $name:ident, $symbol:literal, ($($argument:ident: $type:ty),*)) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As the original.
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name($($argument: $type,)* deadline: *const timespec) -> c_int {
            static NEXT: Next = Next::new($symbol);
            let address = NEXT.address();
            if address.is_null() {
                return libc::ENOSYS;
            }
            // SAFETY: the function of that name has this type.
            let next: extern "C" fn($($type,)* *const timespec) -> c_int = unsafe { std::mem::transmute(address) };
            match true_deadline(deadline) {
                Some(until) => next($($argument,)* &raw const until),
                None => next($($argument,)* deadline),
            }
        }
    };
}

wait_until!(
    /// Stands in for `pthread_cond_timedwait(3)`.
    pthread_cond_timedwait, c"pthread_cond_timedwait", (condition: *mut c_void, mutex: *mut c_void)
);
wait_until!(
    /// Stands in for `pthread_cond_clockwait(3)`.
    pthread_cond_clockwait, c"pthread_cond_clockwait",
    (condition: *mut c_void, mutex: *mut c_void, clock: clockid_t)
);
wait_until!(
    /// Stands in for `pthread_mutex_timedlock(3)`.
    pthread_mutex_timedlock, c"pthread_mutex_timedlock", (mutex: *mut c_void)
);
wait_until!(
    /// Stands in for `pthread_rwlock_timedrdlock(3)`.
    pthread_rwlock_timedrdlock, c"pthread_rwlock_timedrdlock", (lock: *mut c_void)
);
wait_until!(
    /// Stands in for `pthread_rwlock_timedwrlock(3)`.
    pthread_rwlock_timedwrlock, c"pthread_rwlock_timedwrlock", (lock: *mut c_void)
);
wait_until!(
    /// Stands in for `sem_timedwait(3)`, which answers -1 and sets `errno`; both pass through.
    sem_timedwait, c"sem_timedwait", (semaphore: *mut c_void)
);

/// Stands in for `clock_nanosleep(2)`: with `TIMER_ABSTIME` on the wall clock, `request` is a moment.
///
/// # Safety
/// As the original.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn clock_nanosleep(
    clock: clockid_t,
    flags: c_int,
    request: *const timespec,
    remaining: *mut timespec,
) -> c_int {
    static NEXT: Next = Next::new(c"clock_nanosleep");
    let address = NEXT.address();
    if address.is_null() {
        return libc::ENOSYS;
    }
    type Sleep = extern "C" fn(clockid_t, c_int, *const timespec, *mut timespec) -> c_int;
    // SAFETY: the function of that name has this type.
    let next: Sleep = unsafe { std::mem::transmute(address) };
    let moment = clock == libc::CLOCK_REALTIME && flags & libc::TIMER_ABSTIME != 0;
    match true_deadline(request).filter(|_| moment) {
        Some(until) => next(clock, flags, &raw const until, remaining),
        None => next(clock, flags, request, remaining),
    }
}

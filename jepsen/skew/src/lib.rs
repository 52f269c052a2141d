//! A preload library that moves the wall clock of one process, and no other clock.

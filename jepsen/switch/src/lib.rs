//! A network switch whose links fail on command, between TAP devices of network namespaces.
//!
//! The kernel here has no `netem`, so frames take a way through this process: [`tap`] gives each namespace a device,
//! [`engine`] decides what becomes of a frame by the [`rule::Rule`] of its directed link, and [`switch`] is the one
//! thread that moves frames. The engine is data with virtual time and a seed; sockets, clocks and threads are only in
//! `tap` and `switch`. A frame is delivered late, twice, damaged or not at all, and each of these is counted: a fault
//! whose counter stands still did not happen.
//!
//! What never lives here: names of replicas, and anything that runs outside of namespaces of its own.

pub mod engine;
pub mod frame;
pub mod rule;
pub mod switch;
pub mod tap;

pub use engine::{Counters, Engine, Port};
pub use rule::{Damage, Rule};
pub use switch::Switch;
pub use tap::Tap;

//! Session logic against an in-process control plane.

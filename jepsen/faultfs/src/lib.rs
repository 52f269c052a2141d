//! A file system that loses, refuses, delays and corrupts on command: what the harness puts below a replica's data.

//! A switch between the TAP devices of network namespaces, with delay, loss, reordering and duplication per link.

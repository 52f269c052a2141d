//! openraft's own conformance suite, over both engines.

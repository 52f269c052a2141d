//! What workers are held to: its checks, and what differs between two of them.

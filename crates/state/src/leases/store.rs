//! Where runs and leases lie: the records and the indexes that follow them.

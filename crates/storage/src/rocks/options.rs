//! How RocksDB is tuned: for three replicas on one laptop first, and for a busy server by a few numbers.
//!
//! Never here: what decides correctness by a caller's choice. The recovery mode and the tracking of logs are
//! fixed.

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode, LogLevel,
    Options as Native,
};

use crate::engine::Family;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// What a deployment may want to change. The defaults suit a small machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes of table blocks, indexes and filters kept in memory, for all families together.
    pub block_cache_bytes: usize,
    /// Bytes of log entries that gather in memory before they become a table file. Big, because most entries
    /// are purged before that, and then never written a second time.
    pub log_buffer_bytes: usize,
    /// The same for the applied state.
    pub state_buffer_bytes: usize,
    /// Bytes of write-ahead log before idle families are flushed so that its oldest file can go. Bounds the
    /// time that a start spends on replaying.
    pub max_wal_bytes: u64,
    /// Threads for flushes and compactions.
    pub background_jobs: i32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            block_cache_bytes: 32 * MIB,
            log_buffer_bytes: 16 * MIB,
            state_buffer_bytes: 8 * MIB,
            max_wal_bytes: 64 * MIB as u64,
            background_jobs: 2,
        }
    }
}

impl Options {
    pub(super) fn database(&self) -> Native {
        let mut native = Native::default();
        native.create_if_missing(true);
        native.create_missing_column_families(true);
        // A torn last record is what a power loss leaves; a damaged one before it is not, and refuses to
        // open. The default mode would drop everything after the damage in silence, votes and acknowledged
        // entries included.
        native.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        // A log file that is gone or shorter than it was when it was synced refuses to open as well.
        native.set_track_and_verify_wals_in_manifest(true);
        // Recycled log files cannot tell a torn record from an old one, so this stays off with that recovery
        // mode.
        native.set_recycle_log_file_num(0);
        // Each write reaches the operating system at once: a process that dies loses nothing.
        native.set_manual_wal_flush(false);
        native.set_max_total_wal_size(self.max_wal_bytes);
        native.set_bytes_per_sync(MIB as u64);
        native.set_max_background_jobs(self.background_jobs);
        native.set_max_subcompactions(1);
        native.set_max_open_files(256);
        native.set_paranoid_checks(true);
        // RocksDB's own diary: enough for the last incident, never enough to fill a disk.
        native.set_log_level(LogLevel::Warn);
        native.set_keep_log_file_num(4);
        native.set_max_log_file_size(MIB);
        native.set_stats_dump_period_sec(0);
        native.set_stats_persist_period_sec(0);
        native
    }

    pub(super) fn families(&self) -> Vec<ColumnFamilyDescriptor> {
        let cache = Cache::new_lru_cache(self.block_cache_bytes);
        let own =
            Family::ALL.map(|family| ColumnFamilyDescriptor::new(family.name(), self.family(family, &cache)));
        // RocksDB insists on it; we never write to it.
        let default = ColumnFamilyDescriptor::new("default", base(64 * KIB, &cache));
        own.into_iter().chain([default]).collect()
    }

    fn family(&self, family: Family, cache: &Cache) -> Native {
        match family {
            Family::Log => {
                let mut native = base(self.log_buffer_bytes, cache);
                // Entries are short-lived and read once or never: compression and deep levels are wasted on
                // them.
                native.set_compression_type(DBCompressionType::None);
                native.set_num_levels(3);
                native.set_level_compaction_dynamic_level_bytes(false);
                native.set_target_file_size_base(self.log_buffer_bytes as u64);
                native.set_max_bytes_for_level_base(4 * self.log_buffer_bytes as u64);
                native
            }
            Family::Meta => base(MIB, cache),
            Family::State => {
                let mut native = base(self.state_buffer_bytes, cache);
                native.set_compression_type(DBCompressionType::Lz4);
                native
            }
        }
    }
}

fn base(write_buffer_bytes: usize, cache: &Cache) -> Native {
    let mut tables = BlockBasedOptions::default();
    tables.set_block_cache(cache);
    tables.set_block_size(8 * KIB);
    // Indexes and filters count towards the cache, so that memory is bounded however large the state grows.
    tables.set_cache_index_and_filter_blocks(true);
    tables.set_pin_l0_filter_and_index_blocks_in_cache(true);
    tables.set_bloom_filter(10.0, false);
    let mut native = Native::default();
    native.set_block_based_table_factory(&tables);
    native.set_write_buffer_size(write_buffer_bytes);
    native.set_max_write_buffer_number(3);
    native.set_compression_type(DBCompressionType::None);
    native
}

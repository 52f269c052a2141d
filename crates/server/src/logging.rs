//! Logs go to standard error, as text or JSON; panics too.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::{LogFormat, LogSection};

/// Starts logging. `PALYRA_LOG` overrides the configured level.
pub(crate) fn start(section: &LogSection) {
    let mut filter = std::env::var("PALYRA_LOG").unwrap_or_else(|_| section.level.clone());
    if !filter.contains("openraft") {
        // It tells of each heartbeat that fails; `own::tell_changes` says once what an operator needs. Who wants the
        // rest asks for it.
        filter.push_str(",openraft=error");
    }
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        // Or a line that can't be written, as on a full disk, would be a panic of whoever logged it.
        .log_internal_errors(false)
        .with_span_events(FmtSpan::NONE);
    let started = match section.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    if started.is_ok() {
        log_panics();
    }
}

/// A panic is logged like everything else. One on a thread of the replica's core ends the process: what it
/// holds in memory may not match what is on disk any more, and the supervisor's restart reads the disk.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let cause = info.payload_as_str().unwrap_or("no message");
        tracing::error!(thread = name, place, cause, "panic");
        if name.starts_with(CORE_THREADS) {
            std::process::abort();
        }
    }));
}

/// How the threads of the replica's core are named; see `palyra_platform::spawn_io`.
const CORE_THREADS: &str = "palyra-log";

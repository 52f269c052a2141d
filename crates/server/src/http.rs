//! Health, metrics and lists of revoked certificates over plain HTTP, on loopback unless set otherwise.
//!
//! Invariants: nothing here changes anything or waits for a quorum; `/health/live` answers while the process
//! does, `/health/ready` only while the replica may serve nodes.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What health and metrics show of a replica, at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample {
    /// Why the replica may not serve nodes now; nothing when it may.
    pub(crate) not_ready: Option<String>,
    /// leader, follower, candidate or learner.
    pub(crate) role: &'static str,
    /// What is measured.
    pub(crate) figures: Vec<Figure>,
}

/// One thing that is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    /// Its name, without the prefix `palyra_`.
    pub(crate) name: &'static str,
    /// What it does over time.
    pub(crate) kind: Kind,
    /// What it is, in a sentence.
    pub(crate) help: &'static str,
    /// How much it is now.
    pub(crate) value: u64,
}

/// What a figure does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows.
    Counter,
}

/// Where a sample comes from.
pub(crate) type Source = Arc<dyn Fn() -> Sample + Send + Sync>;

/// Serves until `stop` is cancelled.
pub(crate) async fn serve(
    socket: TcpListener,
    source: Source,
    lists: crate::crl::Lists,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let ready = Arc::clone(&source);
    let app = Router::new()
        .route("/health/live", get(async || "live\n"))
        .route("/health/ready", get(async move || answer_ready(&ready())))
        .route(
            "/metrics",
            get(async move || {
                (
                    [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
                    render(&source(), &process()),
                )
            }),
        )
        .merge(crate::crl::routes(lists));
    axum::serve(socket, app)
        .with_graceful_shutdown(async move { stop.cancelled().await })
        .await
}

fn answer_ready(sample: &Sample) -> impl IntoResponse + use<> {
    match &sample.not_ready {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(cause) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {cause}\n")),
    }
}

/// What the operating system says of this process.
#[derive(Clone, Copy, Debug, Default)]
struct Process {
    resident_bytes: u64,
    cpu_ms: u64,
    open_files: u64,
}

fn process() -> Process {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields are counted behind the command's closing bracket, which may hold spaces: 12 and 13 are the CPU
    // ticks, 22 the resident pages.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    let field = |at: usize| {
        fields
            .get(at)
            .and_then(|text| text.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let setting = |name| {
        nix::unistd::sysconf(name)
            .ok()
            .flatten()
            .and_then(|value| u64::try_from(value).ok())
    };
    let page = setting(nix::unistd::SysconfVar::PAGE_SIZE).unwrap_or(4096);
    let ticks = setting(nix::unistd::SysconfVar::CLK_TCK).unwrap_or(100).max(1);
    Process {
        resident_bytes: field(21) * page,
        cpu_ms: (field(11) + field(12)) * 1000 / ticks,
        open_files: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
    }
}

/// Prometheus text.
fn render(sample: &Sample, process: &Process) -> String {
    let mut out = String::with_capacity(4096);
    let mut figure = |name: &str, kind: Kind, help: &str, value: &dyn std::fmt::Display| {
        let kind = if kind == Kind::Gauge { "gauge" } else { "counter" };
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    };
    let ready = u8::from(sample.not_ready.is_none());
    figure(
        "palyra_ready",
        Kind::Gauge,
        "Whether the replica may serve nodes.",
        &ready,
    );
    for Figure {
        name,
        kind,
        help,
        value,
    } in &sample.figures
    {
        figure(&format!("palyra_{name}"), *kind, help, value);
    }
    let bytes = process.resident_bytes;
    figure(
        "process_resident_memory_bytes",
        Kind::Gauge,
        "Resident memory.",
        &bytes,
    );
    let seconds = format!("{}.{:03}", process.cpu_ms / 1000, process.cpu_ms % 1000);
    figure(
        "process_cpu_seconds_total",
        Kind::Counter,
        "CPU time, user and system.",
        &seconds,
    );
    figure(
        "process_open_fds",
        Kind::Gauge,
        "Open file descriptors.",
        &process.open_files,
    );
    let _ = writeln!(
        out,
        "# HELP palyra_role The replica's role in its Raft group.\n# TYPE palyra_role gauge"
    );
    for role in ["leader", "follower", "candidate", "learner"] {
        let _ = writeln!(
            out,
            "palyra_role{{role=\"{role}\"}} {}",
            u8::from(role == sample.role)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_prometheus_text() {
        let sample = Sample {
            not_ready: None,
            role: "leader",
            figures: vec![
                Figure {
                    name: "term",
                    kind: Kind::Gauge,
                    help: "Raft term.",
                    value: 3,
                },
                Figure {
                    name: "syncs_total",
                    kind: Kind::Counter,
                    help: "Syncs.",
                    value: 12,
                },
            ],
        };
        let text = render(
            &sample,
            &Process {
                resident_bytes: 4096,
                cpu_ms: 1_234,
                open_files: 9,
            },
        );
        for line in [
            "palyra_ready 1",
            "# TYPE palyra_term gauge",
            "palyra_term 3",
            "# TYPE palyra_syncs_total counter",
            "palyra_syncs_total 12",
            "process_cpu_seconds_total 1.234",
            "palyra_role{role=\"leader\"} 1",
            "palyra_role{role=\"follower\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }

    #[test]
    fn this_process_has_memory_and_files() {
        let process = process();
        assert!(
            process.resident_bytes > 1 << 20 && process.open_files > 2,
            "{process:?}"
        );
    }
}

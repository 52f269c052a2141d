//! `palyra run start`: a grant, its approval, the input files, the run, its end, and its output files.
//!
//! What never lives here: whether it may run (the cluster's). Invariants: an interrupted command can be taken up
//! again, and says
//! how; nothing is written before the run has succeeded or failed for good.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use palyra_client::{Client, new_ulid};
use palyra_proto::run::v1::{Limits, RunInfo, StartRequest, WorkspaceScope};
use tokio::time::Instant;

use super::view::RunView;
use super::{ANSWER_GRACE, WAIT, files, logs, wait_for_end};
use crate::failure::{Failure, Result};
use crate::job::{Seen, follow, is_over, tell};
use crate::node::parse_label;
use crate::output::time::{millis, parse_limit};
use crate::output::{Out, Source, note, pretty};
use crate::session::Global;

/// The largest parameters that are read; the cluster's own limit is smaller and says so itself.
const PARAMS_MAX: u64 = 16 * 1024 * 1024;
/// The exit code of a command that was interrupted, as shells have it.
const INTERRUPTED: u8 = 130;

/// What is run, with what.
#[derive(Debug, Args)]
pub(crate) struct Start {
    /// The tool, as the policy and workers name it
    #[arg(long)]
    tool: String,
    /// A grant that was given; without it one is asked for, and its approval waited for
    #[arg(long, value_name = "ID")]
    grant: Option<String>,
    /// What whoever approves reads
    #[arg(long, default_value = "", hide_default_value = true, conflicts_with = "grant")]
    summary: String,
    /// What a decision for a session covers
    #[arg(long, default_value = "", hide_default_value = true, conflicts_with = "grant")]
    session: String,
    /// low, medium, high or critical: how whoever approves is told of it; medium without it
    #[arg(long, default_value = "", hide_default_value = true, conflicts_with = "grant")]
    risk: String,
    /// Its parameters: JSON, @FILE, or - for standard input; without it `{}`
    #[arg(long, value_name = "JSON", allow_hyphen_values = true)]
    params: Option<String>,
    /// An input file, or a folder of them, and the name below `in` of the run; several
    #[arg(long = "input", value_name = "PATH[=NAME]")]
    inputs: Vec<String>,
    /// Write the output files there when it has ended
    #[arg(long, value_name = "FOLDER", conflicts_with = "no_wait")]
    output_dir: Option<PathBuf>,
    /// Replace output files that are there
    #[arg(long, requires = "output_dir")]
    overwrite: bool,
    /// Where it may write: root=NAME of a workspace of the worker, rw=PATH, ro=PATH; several
    #[arg(long = "scope", value_name = "KEY=VALUE", value_parser = parse_label)]
    scope: Vec<(String, String)>,
    /// What it may use: memory, disk (512m, 2g), processes, cpu (percent of a core), files, network=true; several
    #[arg(long = "limit", value_name = "KEY=VALUE", value_parser = parse_label)]
    limits: Vec<(String, String)>,
    /// once, or idempotent: what may be tried again on another worker
    #[arg(long, default_value = "", hide_default_value = true)]
    effect: String,
    /// Attempts in all, of an idempotent one
    #[arg(long, value_name = "COUNT", default_value_t = 0, hide_default_value = true)]
    attempts: u32,
    /// Longest time between two renewals of its lease; 30s without it
    #[arg(long, value_name = "DURATION", value_parser = parse_limit)]
    ttl: Option<Duration>,
    /// Least evidence of its worker: self-reported, supervisor, hardware
    #[arg(long, default_value = "", hide_default_value = true)]
    evidence: String,
    /// A label of the worker's node; several must all match
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Wait for its end; this is the default
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Answer once it is accepted and its input files are there
    #[arg(long)]
    no_wait: bool,
    /// Show what it writes while it runs, on standard error
    #[arg(long, conflicts_with = "no_wait")]
    follow: bool,
}

/// `palyra run start`.
pub(crate) async fn run(global: &Global, client: &Client, ask: Start) -> Result {
    let params = params(ask.params.as_deref())?;
    let (scope, limits) = (scope(&ask.scope)?, limits(&ask.limits)?);
    let inputs = files::inputs(&ask.inputs)?;
    let until = Instant::now() + global.timeout.unwrap_or(WAIT);
    let run_id = grant(client, &ask, until).await?;
    let request = StartRequest {
        request_id: global.request_id(),
        run_id: run_id.clone(),
        tool: ask.tool.clone(),
        params: params.into(),
        inputs: files::manifest(&inputs),
        scope,
        limits,
        effect: ask.effect.clone(),
        max_attempts: ask.attempts,
        ttl_ms: ask.ttl.map_or(0, millis),
        timeout_ms: global.timeout.map_or(0, millis),
        min_evidence: ask.evidence.clone(),
        labels: ask.labels.iter().cloned().collect(),
    };
    let answer = tokio::select! {
        answer = client.start_run(request) => {
            let again = |_: &str| format!("palyra run get {run_id}");
            answer.map_err(|error| Failure::from(error).look_again(again))?
        }
        () = interrupt() => {
            note(&format!("interrupted; the run may be accepted: palyra run get {run_id}"));
            return Err(Failure::Silent(INTERRUPTED));
        }
    };
    let source = Source::from(answer.write);
    let accepted = answer.run.unwrap_or_default();
    let sent = files::upload(client, accepted, &inputs).await;
    let accepted = sent.inspect_err(|_| {
        note(&format!(
            "its input files are not all there: palyra run cancel {run_id}, and start it again"
        ));
    })?;
    if ask.no_wait {
        let view = RunView::from(accepted);
        let next = format!("palyra run wait {}", view.id);
        let facts = [
            ("run", view.id.clone()),
            ("state", view.state.clone()),
            ("next", next),
        ];
        return global.out().one(&view, source, &facts);
    }
    let (ended, last) = tokio::select! {
        ended = end_of(client, accepted, source, until, ask.follow) => ended,
        () = interrupt() => Err(Failure::Silent(INTERRUPTED)),
    }
    .inspect_err(|_| note(&format!("look again: palyra run wait {run_id}")))?;
    let source = Source {
        duplicate: source.duplicate,
        ..last
    };
    finish(global.out(), client, ended, source, &ask).await
}

/// The run that may be started: of the grant that was named, or of one that is asked for now.
async fn grant(client: &Client, ask: &Start, until: Instant) -> Result<String> {
    let grant = match &ask.grant {
        Some(id) => super::grants::get(client, id).await?,
        None => {
            let run_id = new_ulid();
            super::grants::create(client, ask, &run_id).await?
        }
    };
    super::grants::wait_active(client, grant, until).await
}

impl Start {
    /// What a grant is asked for with.
    pub(super) fn asks(&self) -> (&str, &str, &str, &str) {
        (&self.tool, &self.session, &self.summary, &self.risk)
    }
}

/// Waits for the end, and shows on the way what the program writes when that is asked for.
async fn end_of(
    client: &Client,
    run: RunInfo,
    source: Source,
    until: Instant,
    follows: bool,
) -> Result<(RunInfo, Source)> {
    if follows {
        let shown = |seen: Seen<'_>| {
            tell(&seen);
            Ok(())
        };
        let ask = async |request| logs(client, request).await;
        follow(ask, &run.id, until, shown).await?;
    }
    // What the cluster ends at the deadline is told, too.
    wait_for_end(client, run, source, until + 2 * ANSWER_GRACE).await
}

/// Prints what became of it, and writes its output files.
async fn finish(out: Out, client: &Client, run: RunInfo, source: Source, ask: &Start) -> Result {
    let over = is_over(&run.state);
    let written = match &ask.output_dir {
        Some(folder) if over => Some(files::download(client, &run, folder, ask.overwrite).await?),
        _ => None,
    };
    let view = RunView::from(run);
    if out.format.is_table() {
        note(&view.summary());
        if let Some(result) = &view.result {
            out.write(&pretty(result)?)?;
        }
        for (label, value) in view.facts() {
            if matches!(label, "error" | "note") && !value.is_empty() {
                note(&format!("  {value}"));
            }
        }
        if let Some(written) = &written {
            note(written.told().trim_end());
        }
        if !over {
            note(&format!("  it goes on; look again: palyra run wait {}", view.id));
        }
    } else {
        out.one(&view, source, &[("run", view.id.clone())])?;
    }
    view.verdict()
}

/// Ctrl-C: the wait ends, the run does not. Never, when the signal can't be watched for.
async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn params(given: Option<&str>) -> Result<Vec<u8>> {
    // No JSON begins with `@` or is `-`: what is meant is never in doubt.
    let (bytes, origin) = match given {
        None => return Ok(b"{}".to_vec()),
        Some("-") => (
            read(std::io::stdin(), Path::new("-"))?,
            "standard input".to_owned(),
        ),
        Some(text) => match text.strip_prefix('@') {
            Some(path) => {
                let path = Path::new(path);
                let file = std::fs::File::open(path).map_err(|error| Failure::file("open", path, &error))?;
                (read(file, path)?, path.display().to_string())
            }
            None => (text.as_bytes().to_vec(), "--params".to_owned()),
        },
    };
    match serde_json::from_slice::<serde_json::Value>(&bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(Failure::usage(
            format!("{origin} holds no JSON: {error}"),
            "parameters are JSON; quote them for the shell: --params '{\"key\":\"value\"}'",
        )),
    }
}

fn read(source: impl Read, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = source.take(PARAMS_MAX).read_to_end(&mut bytes);
    read.map_err(|error| Failure::file("read", path, &error))?;
    Ok(bytes)
}

fn scope(given: &[(String, String)]) -> Result<Option<WorkspaceScope>> {
    if given.is_empty() {
        return Ok(None);
    }
    let mut scope = WorkspaceScope::default();
    for (key, value) in given {
        match key.as_str() {
            "root" => scope.root.clone_from(value),
            "rw" => scope.allowed.push(value.clone()),
            "ro" => scope.read_only.push(value.clone()),
            _ => {
                let message = format!("{key:?} is no part of a scope");
                return Err(Failure::usage(message, "root=NAME, rw=PATH, ro=PATH"));
            }
        }
    }
    Ok(Some(scope))
}

fn limits(given: &[(String, String)]) -> Result<Option<Limits>> {
    if given.is_empty() {
        return Ok(None);
    }
    let mut limits = Limits::default();
    for (key, value) in given {
        let wrong = || {
            let message = format!("{value:?} is no {key}");
            let next = "memory=512m, disk=1g, processes=64, cpu=200, files=256, network=true";
            Failure::usage(message, next)
        };
        let small = || value.parse::<u32>().map_err(|_| wrong());
        match key.as_str() {
            "memory" => limits.memory_bytes = size(value).ok_or_else(wrong)?,
            "disk" => limits.disk_bytes = size(value).ok_or_else(wrong)?,
            "processes" => limits.processes = small()?,
            "cpu" => limits.cpu_percent = small()?,
            "files" => limits.open_files = small()?,
            "network" => limits.network = value.parse().map_err(|_| wrong())?,
            _ => return Err(wrong()),
        }
    }
    Ok(Some(limits))
}

/// `512m` in bytes; a bare number is bytes.
fn size(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let (number, factor) = match lower.as_bytes().last()? {
        b'k' => (&lower[..lower.len() - 1], 1 << 10),
        b'm' => (&lower[..lower.len() - 1], 1 << 20),
        b'g' => (&lower[..lower.len() - 1], 1 << 30),
        _ => (lower.as_str(), 1),
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(own).collect()
    }

    #[test]
    fn limits_and_scopes_are_read_strictly() {
        let read = limits(&pairs(&[("memory", "512m"), ("cpu", "150"), ("network", "true")]));
        let read = read.unwrap().unwrap();
        assert_eq!(
            (read.memory_bytes, read.cpu_percent, read.network),
            (512 << 20, 150, true)
        );
        for bad in [
            ("memory", "lots"),
            ("cpu", "-1"),
            ("network", "yes"),
            ("disks", "1"),
        ] {
            assert_eq!(limits(&pairs(&[bad])).unwrap_err().exit_code(), 2, "{bad:?}");
        }
        assert_eq!(size("18446744073709551615g"), None);
        let read = scope(&pairs(&[("root", "data"), ("rw", "out"), ("ro", "in")]))
            .unwrap()
            .unwrap();
        assert_eq!(
            (read.root.as_str(), read.allowed.len(), read.read_only.len()),
            ("data", 1, 1)
        );
        assert!(scope(&pairs(&[("wr", "out")])).is_err());
    }

    #[test]
    fn parameters_are_json_before_they_are_sent() {
        assert_eq!(params(None).unwrap(), b"{}");
        assert_eq!(params(Some("[1]")).unwrap(), b"[1]");
        assert_eq!(params(Some("nope")).unwrap_err().exit_code(), 2);
        assert_eq!(params(Some("@/does/not/exist")).unwrap_err().exit_code(), 8);
    }
}

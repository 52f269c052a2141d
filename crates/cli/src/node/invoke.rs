//! `palyra node invoke`: one capability of one node, its input, and its result.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use palyra_client::Client;
use palyra_proto::dispatch::v1::{DispatchInfo, InvokeRequest};
use tokio::time::Instant;

use crate::failure::{Failure, Result};
use crate::job::{JobView, Seen, follow, is_over, tell, wait_for_end};
use crate::output::time::millis;
use crate::output::{Out, Source, note, pretty};
use crate::session::Global;

/// The deadline of a dispatch when none is given.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How much longer than the deadline the command waits: what passes it is ended by the cluster, and that is
/// told too.
const GRACE: Duration = Duration::from_secs(2);
/// The exit code of a command that was interrupted, as shells have it.
const INTERRUPTED: u8 = 130;
/// The largest input that is read; the cluster's own limit is smaller and says so itself.
const INPUT_MAX: u64 = 16 * 1024 * 1024;

/// What is run, with what.
#[derive(Debug, Args)]
pub(crate) struct Invoke {
    /// Device id, name, or the beginning of an id
    node: String,
    /// The capability, see `palyra node describe`
    capability: String,
    /// Its input: JSON, @FILE, or - for standard input; without it `{}`
    #[arg(
        long,
        value_name = "JSON",
        conflicts_with = "input_file",
        allow_hyphen_values = true
    )]
    input: Option<String>,
    /// A file with its input; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    input_file: Option<PathBuf>,
    /// Wait for the result; this is the default
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Answer once the job is accepted
    #[arg(long)]
    no_wait: bool,
    /// Show what the program writes while it runs, on standard error
    #[arg(long, conflicts_with = "no_wait")]
    follow: bool,
    /// Which of the jobs that wait for the node goes first: low, normal, high. A class passes what is up to five
    /// minutes older
    #[arg(long, value_name = "CLASS", default_value = "", hide_default_value = true)]
    priority: String,
    /// How often it may be tried again, fewer times than the capability allows
    #[arg(long, value_name = "COUNT")]
    retries: Option<u32>,
}

fn input(invoke: &Invoke) -> Result<Vec<u8>> {
    // No JSON begins with `@` or is `-`: what is meant is never in doubt.
    let named = invoke.input.as_deref().and_then(|text| match text {
        "-" => Some(Path::new("-")),
        _ => text.strip_prefix('@').map(Path::new),
    });
    let (text, origin) = match (named.or(invoke.input_file.as_deref()), &invoke.input) {
        (Some(path), _) if path == Path::new("-") => {
            (read_limited(std::io::stdin(), path)?, "standard input".to_owned())
        }
        (Some(path), _) => {
            let file = std::fs::File::open(path).map_err(|error| Failure::file("open", path, &error))?;
            (read_limited(file, path)?, path.display().to_string())
        }
        (None, Some(text)) => (text.clone().into_bytes(), "--input".to_owned()),
        (None, None) => (b"{}".to_vec(), String::new()),
    };
    // As a text first: bytes that are none would pass a parser that only skips over strings.
    let checked = std::str::from_utf8(&text)
        .map_err(|error| error.to_string())
        .and_then(|text| {
            let parsed = serde_json::from_str::<serde::de::IgnoredAny>(text);
            parsed.map_err(|error| error.to_string())
        });
    match checked {
        Ok(_) => Ok(text),
        Err(error) => {
            let next = "inputs are JSON; quote them for the shell: --input '{\"key\":\"value\"}'";
            Err(Failure::usage(format!("{origin} holds no JSON: {error}"), next))
        }
    }
}

fn read_limited(source: impl Read, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = source.take(INPUT_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|error| Failure::file("read", path, &error))?;
    if bytes.len() as u64 > INPUT_MAX {
        return Err(Failure::usage(
            format!("{} is larger than {INPUT_MAX} bytes", path.display()),
            "send less",
        ));
    }
    Ok(bytes)
}

/// Submits, waits, prints.
pub(crate) async fn run(global: &Global, client: &Client, invoke: Invoke) -> Result {
    let payload = input(&invoke)?;
    let timeout = global.timeout.unwrap_or(TIMEOUT);
    let until = Instant::now() + timeout + GRACE;
    let wait = !invoke.no_wait;
    let request = InvokeRequest {
        request_id: global.request_id(),
        device_id: invoke.node.clone(),
        capability: invoke.capability,
        payload: payload.into(),
        timeout_ms: millis(timeout),
        // Accepted first: a cluster that cannot take it says so within the timeout, and not after the wait for its end.
        wait_ms: 0,
        priority: invoke.priority.clone(),
        max_attempts: invoke.retries.map_or(0, |retries| retries.saturating_add(1)),
    };
    let again = |id: &str| format!("the same command with --request-id {id}, or: palyra job ls");
    let request_id = request.request_id.clone();
    let answer = tokio::select! {
        answer = client.invoke(request) => answer.map_err(|error| Failure::from(error).look_again(again))?,
        () = interrupt() => {
            note(&format!("interrupted; the job may be accepted: {}", again(&request_id)));
            return Err(Failure::Silent(INTERRUPTED));
        }
    };
    let mut source = Source::from(answer.write);
    let mut dispatch = answer.dispatch.unwrap_or_default();
    if wait && !is_over(&dispatch.state) {
        let duplicate = source.duplicate;
        let id = dispatch.id.clone();
        let ended = tokio::select! {
            ended = end_of(client, dispatch, source, until, invoke.follow) => ended,
            () = interrupt() => Err(Failure::Silent(INTERRUPTED)),
        };
        // It was accepted, so it goes on without us: whoever waited needs its name.
        (dispatch, source) =
            ended.inspect_err(|_| note(&format!("look again: palyra job get {id} --wait")))?;
        source.duplicate = duplicate;
    }
    let view = JobView::from(dispatch);
    print(global.out(), &view, source, wait, &invoke.node)?;
    if wait { view.verdict() } else { Ok(()) }
}

/// Waits for the end, and shows on the way what the program writes when that is asked for.
async fn end_of(
    client: &Client,
    dispatch: DispatchInfo,
    source: Source,
    until: Instant,
    follows: bool,
) -> Result<(DispatchInfo, Source)> {
    if follows {
        let shown = |seen: Seen<'_>| {
            tell(&seen);
            Ok(())
        };
        let ask = async |request| Ok(client.dispatch_logs(request).await?);
        follow(ask, &dispatch.id, until, shown).await?;
    }
    wait_for_end(client, dispatch, source, until).await
}

/// Ctrl-C: the wait ends, the job does not. Never, when the signal can't be watched for.
async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn print(out: Out, view: &JobView, source: Source, wait: bool, node: &str) -> Result {
    if !out.format.is_table() {
        return out.one(view, source, &[]);
    }
    if !wait {
        let next = format!("palyra job get {} --wait", view.id);
        return out.one(
            view,
            source,
            &[
                ("job", view.id.clone()),
                ("state", view.state.clone()),
                ("next", next),
            ],
        );
    }
    note(&view.summary(node));
    if let Some(result) = &view.result {
        out.write(&pretty(result)?)?;
    }
    for (label, value) in view.facts() {
        if label == "error" && !value.is_empty() {
            note(&format!("  {value}"));
        }
    }
    if !is_over(&view.state) {
        note(&format!(
            "  it goes on; look again: palyra job get {} --wait",
            view.id
        ));
    } else if !view.caveat().is_empty() {
        note(&format!("  {}", view.caveat()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invoke(input: Option<&str>, file: Option<&Path>) -> Invoke {
        Invoke {
            node: String::new(),
            capability: String::new(),
            input: input.map(str::to_owned),
            input_file: file.map(Path::to_owned),
            wait: false,
            no_wait: false,
            follow: false,
            priority: String::new(),
            retries: None,
        }
    }

    #[test]
    fn inputs_are_json_before_they_are_sent() {
        assert_eq!(input(&invoke(None, None)).unwrap(), b"{}");
        assert_eq!(input(&invoke(Some("[1]"), None)).unwrap(), b"[1]");
        for bad in ["", "{", "{} {}", "nope"] {
            assert_eq!(
                input(&invoke(Some(bad), None)).unwrap_err().exit_code(),
                2,
                "{bad:?}"
            );
        }
        let missing = input(&invoke(None, Some(Path::new("/does/not/exist")))).unwrap_err();
        assert_eq!(missing.exit_code(), 8);
    }

    #[test]
    fn an_input_may_be_a_file() {
        let file = std::env::temp_dir().join(format!("palyra-input-{}", palyra_client::new_ulid()));
        let named = format!("@{}", file.display());
        std::fs::write(&file, "{\"a\":1}").unwrap();
        assert_eq!(input(&invoke(Some(&named), None)).unwrap(), b"{\"a\":1}");
        assert_eq!(input(&invoke(None, Some(&file))).unwrap(), b"{\"a\":1}");
        std::fs::write(&file, b"\"\xff\"").unwrap();
        let failure = input(&invoke(Some(&named), None)).unwrap_err();
        assert_eq!(failure.exit_code(), 2, "what is no text is no JSON");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(input(&invoke(Some(&named), None)).unwrap_err().exit_code(), 8);
        assert_eq!(input(&invoke(Some("-1"), None)).unwrap(), b"-1");
    }
}

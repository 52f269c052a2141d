//! Failpoints: named places in the replica's own code, `palyra_platform::io_point`, at which it dies or waits.
//!
//! Only a binary that was built with `--features planted` has them. It listens on a socket that
//! `PALYRA_FAILPOINTS` names; see
//! `crates/fault/src/armed.rs` for what is said there. The first fault of a replica starts it anew, with that variable.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::{Evidence, Fault, Kind, Nemesis};
use crate::cluster::State;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

/// How long a replica gets for one answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Passes that wait, of one fault.
const TIMES: u64 = 20;
/// Bytes that a socket's path may have.
const PATH_MAX: usize = 100;

pub(super) const KINDS: &[Kind] = &[Kind {
    name: "failpoint",
    argument: Some("POINT=crash|POINT=sleep:MS"),
    does: "a replica dies or waits at a named place of its code; needs a binary built with --features planted",
    needs: &[],
    all: None,
    make: |argument| Ok(Box::new(Failpoint::parse(argument)?)),
}];

/// What happens at the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    Crash,
    Sleep(u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Failpoint {
    name: String,
    point: String,
    does: Does,
}

impl Failpoint {
    fn parse(argument: &str) -> Result<Failpoint> {
        let wrong =
            || format!("failpoint:{argument}: write failpoint:POINT=crash or failpoint:POINT=sleep:MS");
        let (point, does) = argument.split_once('=').with_context(wrong)?;
        let named = |c: char| c.is_ascii_lowercase() || c == '.' || c == '-' || c == '_';
        ensure!(
            !point.is_empty() && point.len() < 64 && point.chars().all(named),
            wrong()
        );
        let does = match (does, does.strip_prefix("sleep:")) {
            ("crash", _) => Does::Crash,
            (_, Some(ms)) => Does::Sleep(
                ms.parse()
                    .ok()
                    .filter(|ms| (1..=60_000).contains(ms))
                    .with_context(wrong)?,
            ),
            _ => bail!(wrong()),
        };
        Ok(Failpoint {
            name: format!("failpoint:{argument}"),
            point: point.to_owned(),
            does,
        })
    }

    fn arm(&self) -> String {
        match self.does {
            Does::Crash => format!("arm {} crash", self.point),
            Does::Sleep(ms) => format!("arm {} sleep {ms} {TIMES}", self.point),
        }
    }
}

/// Says one line to a process and hears one.
async fn ask(socket: &Path, line: &str) -> Result<String> {
    let talk = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(format!("{line}\n").as_bytes()).await?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await?;
        std::io::Result::Ok(answer.trim().to_owned())
    };
    let answer = tokio::time::timeout(ANSWER, talk)
        .await
        .with_context(|| format!("{} does not answer", socket.display()))?
        .with_context(|| format!("{} does not answer", socket.display()))?;
    ensure!(
        answer != "what?" && !answer.is_empty(),
        "{line:?} was not understood"
    );
    Ok(answer)
}

async fn hits(socket: &Path, point: &str) -> Result<u64> {
    let answer = ask(socket, &format!("hits {point}")).await?;
    answer
        .parse()
        .with_context(|| format!("hits of {point}: {answer:?} is no number"))
}

/// Sees to it that a replica listens; starts it anew when it does not.
async fn listening(run: &Arc<Run>, id: u64) -> Result<PathBuf> {
    let socket = run.cluster.folder(id).join("failpoints.sock");
    ensure!(
        socket.as_os_str().len() < PATH_MAX,
        "the path {} is too long for a socket; run it from a shorter folder",
        socket.display()
    );
    if ask(&socket, "hits none").await.is_ok() {
        return Ok(socket);
    }
    let value = socket.clone().into_os_string();
    run.cluster.launch(id, |launch| {
        launch.environment.insert("PALYRA_FAILPOINTS".to_owned(), value);
    })?;
    ensure!(run.cluster.state(id) == State::Up, "r{id} does not run");
    run.cluster.kill(id).await?;
    run.cluster.start(id).await?;
    ask(&socket, "hits none").await.with_context(|| {
        format!("r{id} has no failpoints: build it with --features palyra-server/planted")
    })?;
    Ok(socket)
}

/// What is known of one replica.
struct Armed {
    socket: PathBuf,
    pid: Option<u32>,
    hits: u64,
}

struct Pointed {
    asked: Failpoint,
    armed: BTreeMap<u64, Armed>,
}

#[async_trait]
impl Nemesis for Failpoint {
    fn name(&self) -> &str {
        &self.name
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::Leader, Target::One, Target::Follower]
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let mut armed = BTreeMap::new();
        for id in targets {
            let socket = listening(run, *id).await?;
            let hits = hits(&socket, &self.point).await?;
            if matches!(self.does, Does::Crash) {
                run.cluster.may_end(*id)?;
            }
            ask(&socket, &self.arm()).await?;
            let pid = run.cluster.pid(*id);
            armed.insert(*id, Armed { socket, pid, hits });
        }
        let asked = self.clone();
        Ok(Box::new(Pointed { asked, armed }))
    }
}

#[async_trait]
impl Fault for Pointed {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let point = &self.asked.point;
        let (mut happened, mut seen) = (true, Vec::new());
        for (id, armed) in &self.armed {
            let passed = hits(&armed.socket, point).await.ok();
            let ended = armed.pid.is_none_or(|pid| !is_alive(pid));
            match (self.asked.does, passed) {
                (Does::Crash, _) if ended => {
                    seen.push(format!("r{id} died at {point}"));
                    // Whatever is left of it: the cluster has not heard of its end.
                    let _ = run.cluster.kill(*id).await;
                    if run.cluster.state(*id) == State::Down {
                        run.cluster.start(*id).await?;
                    }
                }
                (Does::Sleep(_), Some(passed)) if passed > armed.hits => {
                    ask(&armed.socket, &format!("disarm {point}")).await?;
                    seen.push(format!("r{id} passed {point} {} times", passed - armed.hits));
                }
                (_, passed) => {
                    happened = false;
                    // Another fault may have ended it, and with it what was armed.
                    let _ = ask(&armed.socket, &format!("disarm {point}")).await;
                    let passed =
                        passed.map_or_else(|| "is gone".to_owned(), |_| format!("did not pass {point}"));
                    seen.push(format!("r{id} {passed}"));
                }
            }
            if matches!(self.asked.does, Does::Crash) {
                run.cluster.must_live(*id)?;
            }
        }
        Ok(Evidence::when(happened, seen.join("; ")))
    }
}

/// Whether a process runs; one that has ended and was not waited for does not.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        let crash = Failpoint::parse("log.sync=crash").unwrap();
        assert_eq!(
            (crash.name.as_str(), crash.arm().as_str()),
            ("failpoint:log.sync=crash", "arm log.sync crash")
        );
        let sleep = Failpoint::parse("apply.write=sleep:250").unwrap();
        assert_eq!(sleep.arm(), "arm apply.write sleep 250 20");
        for wrong in [
            "",
            "x",
            "=crash",
            "log.sync=",
            "log.sync=boom",
            "log.sync=sleep:",
            "a b=crash",
            "x=sleep:0",
        ] {
            let error = Failpoint::parse(wrong).unwrap_err().to_string();
            assert!(error.contains("POINT=crash"), "{wrong}: {error}");
        }
    }

    #[test]
    fn this_process_is_alive_and_one_that_is_none_is_not() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
    }
}

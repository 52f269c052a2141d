//! The agent's socket in its data folder: one JSON question a connection, one JSON answer.
//!
//! Invariants: only the folder's owner can connect (folder 0700, socket 0600); a question has a size limit
//! and a time limit; whatever a client does, the agent goes on.

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::mediation::{Desk, Pending};
use crate::service::AgentStatus;
use crate::{Error, Home, Kind, Result};

const MAX_QUESTION: u64 = 64 * 1024;
const MAX_ANSWER: u64 = 32 << 20;
const PATIENCE: Duration = Duration::from_secs(5);
const MAX_CLIENTS: usize = 32;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Question {
    /// How are you?
    Status,
    /// What waits for a person?
    Mediation,
    /// This is the person's decision.
    Decide {
        /// A dispatch, or a prefix that names one.
        id: String,
        /// Whether it may run.
        allow: bool,
    },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Status(Box<AgentStatus>),
    Mediation(Vec<Pending>),
    Decided(Pending),
    Refused {
        code: String,
        message: String,
        next: String,
        kind: u8,
    },
}

/// The socket's address through an open folder: the path of a data folder may be longer than a socket's may
/// be.
struct Address {
    _dir: File,
    path: PathBuf,
}

fn address(home: &Home) -> Result<Address> {
    let dir = File::open(home.run_dir()).map_err(|error| Error::io("open", &home.run_dir(), &error))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/agent.sock", dir.as_raw_fd()));
    Ok(Address { _dir: dir, path })
}

/// Makes the socket, in place of one that a dead agent left. Call with the folder's lock held.
pub(crate) fn bind(home: &Home) -> Result<UnixListener> {
    let shown = home.run_dir().join("agent.sock");
    home.remove("run/agent.sock")?;
    let address = address(home)?;
    let listener =
        UnixListener::bind(&address.path).map_err(|error| Error::io("listen on", &shown, &error))?;
    std::fs::set_permissions(&shown, Permissions::from_mode(0o600))
        .map_err(|error| Error::io("protect", &shown, &error))?;
    Ok(listener)
}

/// Answers questions for as long as it is polled.
pub(crate) async fn serve(listener: UnixListener, status: watch::Receiver<AgentStatus>, desk: Arc<Desk>) {
    let begun = Instant::now();
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < MAX_CLIENTS => match accepted {
                Ok((stream, _)) => {
                    let (status, desk) = (status.clone(), Arc::clone(&desk));
                    clients.spawn(async move {
                        let _ = timeout(PATIENCE, converse(stream, &status, &desk, begun)).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the agent's socket fails");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            },
            Some(_) = clients.join_next() => {}
        }
    }
}

async fn converse(
    mut stream: UnixStream,
    status: &watch::Receiver<AgentStatus>,
    desk: &Desk,
    begun: Instant,
) -> std::io::Result<()> {
    let mut question = Vec::new();
    (&mut stream)
        .take(MAX_QUESTION)
        .read_to_end(&mut question)
        .await?;
    let answer = match serde_json::from_slice(&question) {
        Ok(Question::Status) => {
            let mut now = status.borrow().clone();
            now.uptime_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            Answer::Status(Box::new(now))
        }
        Ok(Question::Mediation) => Answer::Mediation(desk.list()),
        Ok(Question::Decide { id, allow }) => match desk.decide(&id, allow) {
            Ok(pending) => Answer::Decided(pending),
            Err(error) => refused(&error),
        },
        Err(error) => refused(&Error::new(
            Kind::Usage,
            "N0603",
            format!("not a question: {error}"),
            "",
        )),
    };
    let text = serde_json::to_vec(&answer).map_err(std::io::Error::other)?;
    stream.write_all(&text).await?;
    stream.shutdown().await
}

fn refused(error: &Error) -> Answer {
    let Error {
        code, message, next, ..
    } = error.clone();
    Answer::Refused {
        code,
        message,
        next,
        kind: error.exit_code(),
    }
}

/// Asks the agent of this folder.
///
/// Errors: none runs, it doesn't answer, it refuses.
pub(crate) async fn ask(home: &Home, question: &Question) -> Result<Answer> {
    let asked = timeout(PATIENCE, exchange(home, question)).await;
    let silent = |why: String| {
        let message = format!("the agent of {} does not answer: {why}", home.dir().display());
        Error::new(
            Kind::Unreachable,
            "N0108",
            message,
            "see its log, or start it: palyra node start",
        )
    };
    let text = match asked {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return Err(silent(error)),
        Err(_) => return Err(silent(format!("nothing within {} s", PATIENCE.as_secs()))),
    };
    match serde_json::from_slice(&text).map_err(|error| silent(error.to_string()))? {
        Answer::Refused {
            code,
            message,
            next,
            kind,
        } => {
            let kind = match kind {
                2 => Kind::Usage,
                8 => Kind::NotFound,
                _ => Kind::Internal,
            };
            Err(Error {
                kind,
                code,
                message,
                next,
            })
        }
        answer => Ok(answer),
    }
}

async fn exchange(home: &Home, question: &Question) -> std::result::Result<Vec<u8>, String> {
    let address = address(home).map_err(|error| error.message)?;
    let text = serde_json::to_vec(question).map_err(|error| error.to_string())?;
    let talk = async {
        let mut stream = UnixStream::connect(&address.path).await?;
        stream.write_all(&text).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    talk.await.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
            "it is not running".to_owned()
        }
        _ => error.to_string(),
    })
}

/// An answer to another question.
pub(crate) fn odd(answer: &Answer) -> Error {
    Error::new(
        Kind::Internal,
        "N0001",
        format!("the agent gave an odd answer: {answer:?}"),
        "palyra node restart",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(home: &Home) -> (tokio::task::JoinHandle<()>, Arc<Desk>, watch::Sender<AgentStatus>) {
        let (sender, status) = watch::channel(AgentStatus {
            pid: 5,
            ..AgentStatus::default()
        });
        let desk = Arc::new(Desk::default());
        (
            tokio::spawn(serve(bind(home).unwrap(), status, Arc::clone(&desk))),
            desk,
            sender,
        )
    }

    #[tokio::test]
    async fn status_and_decisions_pass_even_from_a_long_path() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(&dir.path().join("x".repeat(120))).unwrap();
        assert_eq!(ask(&home, &Question::Status).await.unwrap_err().code, "N0108");
        let (_task, desk, _status) = agent(&home);
        let Answer::Status(status) = ask(&home, &Question::Status).await.unwrap() else {
            panic!("no status")
        };
        assert_eq!(status.pid, 5);
        let asked = desk.ask(Pending {
            id: "01AA".to_owned(),
            capability: "c".to_owned(),
            description: String::new(),
            payload: "{}".to_owned(),
            since_ms: 1,
            deadline_at_ms: 2,
        });
        assert_eq!(crate::mediation::list(home.dir()).await.unwrap().len(), 1);
        assert_eq!(
            crate::mediation::decide(home.dir(), "02", true)
                .await
                .unwrap_err()
                .exit_code(),
            8
        );
        crate::mediation::decide(home.dir(), "01", false).await.unwrap();
        assert!(!asked.await.unwrap());
        let mode = std::fs::metadata(home.run_dir().join("agent.sock"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn nonsense_is_refused_and_the_agent_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(dir.path()).unwrap();
        let (_task, _desk, _status) = agent(&home);
        let mut stream = UnixStream::connect(home.run_dir().join("agent.sock"))
            .await
            .unwrap();
        stream.write_all(b"{\"nonsense\":1}").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("N0603"), "{answer}");
        assert!(ask(&home, &Question::Status).await.is_ok());
    }
}

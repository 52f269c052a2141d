//! A cluster of real `palyrad` processes on loopback, each with its own folder, and the operator's command
//! line.
//!
//! Invariants: processes end with this one, even when it is killed; ports are free when they are chosen; a
//! replica counts as started when it says so.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use palyra_client::{Client, ConnectOptions, Contexts, Endpoints};
use palyra_pki::Credential;
use palyra_proto::cluster::v1::StatusResponse;
use serde_json::Value;

/// For a process to say that it is ready.
const READY: Duration = Duration::from_secs(30);

/// The processes and their folders.
pub struct Cluster {
    dir: Option<tempfile::TempDir>,
    path: PathBuf,
    base: u16,
    replicas: BTreeMap<u64, Child>,
    watchdog: Child,
    _alive: ChildStdin,
}

/// What a command of `palyra` answered.
pub struct Answer {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Answer {
    /// The first value under `name`, at any depth of the JSON on standard output.
    #[must_use]
    pub fn field(&self, name: &str) -> Value {
        let value: Value = serde_json::from_str(&self.out)
            .unwrap_or_else(|error| panic!("no JSON ({error}):\n{}\n{}", self.out, self.err));
        find(&value, name).unwrap_or_else(|| panic!("no field {name} in {}", self.out))
    }

    /// Insists on success; often that is all that is wanted of the answer.
    pub fn ok(self) -> Self {
        assert_eq!(
            self.code, 0,
            "exit code {}:\n{}\n{}",
            self.code, self.out, self.err
        );
        self
    }
}

fn find(value: &Value, name: &str) -> Option<Value> {
    match value {
        Value::Object(map) => map
            .get(name)
            .cloned()
            .or_else(|| map.values().find_map(|inner| find(inner, name))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, name)),
        _ => None,
    }
}

/// The binary of that name, next to the tests'.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let folder = here.parent().unwrap().parent().unwrap();
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is missing: cargo build --workspace --bins",
        path.display()
    );
    path
}

impl Cluster {
    /// Makes a cluster of `count` voters: the first is born, the others join by token.
    #[must_use]
    pub fn birth(count: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("palyra-e2e-").tempdir().unwrap();
        let path = dir.path().to_path_buf();
        let (watchdog, alive) = watch_over(&path);
        let mut cluster = Self {
            dir: Some(dir),
            path,
            base: free_ports(),
            replicas: BTreeMap::new(),
            watchdog,
            _alive: alive,
        };
        let _ = cluster
            .palyra(&[
                "cluster",
                "init",
                "--data-dir",
                &cluster.folder(1),
                "--name",
                "r1",
                "--listen-host",
                "127.0.0.1",
                "--base-port",
                &cluster.port(1, 0).to_string(),
                "--context",
                "local",
            ])
            .ok();
        cluster.start_replica(1);
        for id in 2..=count {
            let name = format!("r{id}");
            let token = cluster
                .palyra(&["cluster", "join-token", "--name", &name, "-o", "json"])
                .ok();
            let token = token.field("token").as_str().unwrap().to_owned();
            let joined = cluster.join(&token, &name, id);
            assert_eq!(joined.code, 0, "{}{}", joined.out, joined.err);
            cluster.start_replica(id);
        }
        let all: Vec<String> = (1..=count).map(|id| cluster.node_addr(id)).collect();
        let _ = cluster
            .palyra(&["context", "add", "local", "--endpoints", &all.join(",")])
            .ok();
        let until = Instant::now() + READY;
        loop {
            let status = cluster.palyra(&["cluster", "status", "-o", "json"]);
            if status.code == 0 && status.field("voters") == count {
                return cluster;
            }
            assert!(
                Instant::now() < until,
                "not {count} voters in time: {}{}",
                status.out,
                status.err
            );
        }
    }

    /// Runs `palyrad join` for replica `id` with a token.
    #[must_use]
    pub fn join(&self, token: &str, name: &str, id: u64) -> Answer {
        let file = self.path.join(format!("{name}.token"));
        std::fs::write(&file, token).unwrap();
        let port = self.port(id, 0).to_string();
        let mut command = Command::new(binary("palyrad"));
        command.args([
            "join",
            "--listen-host",
            "127.0.0.1",
            "--name",
            name,
            "--base-port",
            &port,
        ]);
        command
            .arg("--token-file")
            .arg(&file)
            .arg("--data-dir")
            .arg(self.folder(id));
        answer(command.output().unwrap())
    }

    /// Runs any command of `palyrad` to its end.
    #[must_use]
    pub fn palyrad(&self, arguments: &[&str]) -> Answer {
        answer(Command::new(binary("palyrad")).args(arguments).output().unwrap())
    }

    /// Runs a command of `palyra` as the first operator, to its end.
    #[must_use]
    pub fn palyra(&self, arguments: &[&str]) -> Answer {
        let mut command = Command::new(binary("palyra"));
        answer(
            command
                .args(arguments)
                .env("PALYRA_HOME", self.operator_home())
                .output()
                .unwrap(),
        )
    }

    /// Starts a replica and waits until it says that it is ready.
    pub fn start_replica(&mut self, id: u64) {
        let logs = self.path.join("logs");
        std::fs::create_dir_all(&logs).unwrap();
        let errors = File::options()
            .append(true)
            .create(true)
            .open(logs.join(format!("r{id}.err")))
            .unwrap();
        let mut child = Command::new(binary("palyrad"))
            .args(["run", "--config", &format!("{}/palyrad.toml", self.folder(id))])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .unwrap();
        self.note(&format!("r{id}"), child.id());
        let ready = follow(&mut child, &logs.join(format!("r{id}.out")), "palyrad ready");
        self.replicas.insert(id, child);
        if ready.recv_timeout(READY).is_err() {
            panic!("replica {id} did not become ready:\n{}", self.log(id));
        }
    }

    /// Kills a replica with SIGKILL.
    pub fn kill(&mut self, id: u64) {
        let mut child = self.replicas.remove(&id).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Tells a replica to stop, and waits until it has.
    pub fn terminate(&mut self, id: u64) {
        self.signal(id, Signal::SIGTERM);
        let status = self.replicas.remove(&id).unwrap().wait().unwrap();
        assert!(status.success(), "replica {id}: {status}\n{}", self.log(id));
    }

    /// How a replica ended, if it did so by itself.
    pub fn ended(&mut self, id: u64) -> Option<ExitStatus> {
        let status = self.replicas.get_mut(&id)?.try_wait().unwrap()?;
        self.replicas.remove(&id);
        Some(status)
    }

    /// What a replica has logged.
    #[must_use]
    pub fn log(&self, id: u64) -> String {
        std::fs::read_to_string(self.path.join(format!("logs/r{id}.err"))).unwrap_or_default()
    }

    /// Stops a replica where it stands, as a machine that hangs does; its connections stay open.
    pub fn freeze(&self, id: u64) {
        self.signal(id, Signal::SIGSTOP);
    }

    /// Has a frozen replica go on.
    pub fn thaw(&self, id: u64) {
        self.signal(id, Signal::SIGCONT);
    }

    fn signal(&self, id: u64, signal: Signal) {
        let pid = i32::try_from(self.replicas[&id].id()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    }

    /// Ids of the replicas that run.
    #[must_use]
    pub fn running(&self) -> Vec<u64> {
        self.replicas.keys().copied().collect()
    }

    /// The folder for everything of this cluster.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A replica's data folder.
    #[must_use]
    pub fn folder(&self, id: u64) -> String {
        self.path.join(format!("r{id}")).display().to_string()
    }

    /// A replica's port.
    #[must_use]
    pub fn port(&self, id: u64, offset: u16) -> u16 {
        self.base + 10 * u16::try_from(id - 1).unwrap() + offset
    }

    /// Where nodes and operators reach a replica.
    #[must_use]
    pub fn node_addr(&self, id: u64) -> String {
        format!("127.0.0.1:{}", self.port(id, 1))
    }

    /// Where machines enrol at a replica.
    #[must_use]
    pub fn enrol_addr(&self, id: u64) -> String {
        format!("127.0.0.1:{}", self.port(id, 2))
    }

    /// The first operator's credential.
    #[must_use]
    pub fn operator(&self) -> Credential {
        let contexts = Contexts::load(&self.operator_home()).unwrap();
        contexts
            .select(None)
            .unwrap()
            .1
            .credential(&self.operator_home())
            .unwrap()
    }

    /// A client of all replicas, as the first operator.
    #[must_use]
    pub fn client(&self) -> Client {
        let all: Vec<String> = (1..=3).map(|id| self.node_addr(id)).collect();
        Client::new(
            &self.operator(),
            Some(Endpoints::new(&all).unwrap()),
            ConnectOptions::default(),
        )
        .unwrap()
    }

    /// A client of one replica, as the first operator.
    #[must_use]
    pub fn client_at(&self, id: u64) -> Client {
        let only = Endpoints::new([self.node_addr(id)]).unwrap();
        Client::new(&self.operator(), Some(only), ConnectOptions::default()).unwrap()
    }

    /// Waits until the cluster's status is as wanted.
    pub async fn becomes(
        &self,
        what: &str,
        mut wanted: impl FnMut(&StatusResponse) -> bool,
    ) -> StatusResponse {
        let client = self.client();
        eventually(what, async || {
            client.status().await.ok().filter(|status| wanted(status))
        })
        .await
    }

    /// Has the folder stay when the cluster ends.
    pub fn keep(&mut self) -> PathBuf {
        self.dir
            .take()
            .map_or_else(|| self.path.clone(), tempfile::TempDir::keep)
    }

    /// Writes a process id down for the watchdog.
    pub(crate) fn note(&self, name: &str, pid: u32) {
        std::fs::write(self.path.join(format!("{name}.pid")), pid.to_string()).unwrap();
    }

    /// The folder of contexts of the first operator.
    #[must_use]
    pub fn operator_home(&self) -> PathBuf {
        self.path.join("operator")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.replicas.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = self.watchdog.kill();
        let _ = self.watchdog.wait();
    }
}

/// Waits until `ask` answers, at most 30 seconds.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < until, "gave up waiting for {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Copies a child's output to a file; the receiver hears of the first line that begins with `wanted`.
pub(crate) fn follow(child: &mut Child, copy: &Path, wanted: &'static str) -> mpsc::Receiver<()> {
    let (said, heard) = mpsc::channel();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut file = File::options().append(true).create(true).open(copy).unwrap();
    std::thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            let _ = writeln!(file, "{line}");
            if line.starts_with(wanted) {
                let _ = said.send(());
            }
        }
    });
    heard
}

fn answer(output: Output) -> Answer {
    Answer {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A shell that kills our processes when this one is gone: its standard input ends then.
fn watch_over(path: &Path) -> (Child, ChildStdin) {
    let script = "cat >/dev/null; for file in \"$1\"/*.pid; do pid=$(cat \"$file\"); \
                  case $(readlink \"/proc/$pid/exe\") in */palyra|*/palyrad) kill -9 \"$pid\";; esac; done; \
                  rm -rf \"$1\"";
    let mut child = Command::new("setsid")
        .args(["sh", "-c", script, "sh"])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let alive = child.stdin.take().unwrap();
    (child, alive)
}

/// A base such that the ports of five replicas are free now.
fn free_ports() -> u16 {
    let seed = u16::try_from(std::process::id() % 2000).unwrap();
    for step in 0..2000u16 {
        let base = 20_000 + (seed + step * 7) % 2000 * 20;
        let mut ports =
            (0..5u16).flat_map(|replica| (0..6u16).map(move |offset| base + 10 * replica + offset));
        if ports.all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return base;
        }
    }
    panic!("no free ports");
}

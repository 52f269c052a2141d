//! Replicas in network namespaces of their own, joined by a bridge, one of which can be cut off by nftables.
//!
//! What never lives here: replicas. Everything is inside namespaces of this process's own, which it enters by running
//! itself once more under `unshare -n -m`; when it ends the kernel takes all of it away, and the machine's own
//! network was never touched.

use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::sync::mpsc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::cluster::Place;

/// Says to the second run of this program that it is inside.
const INSIDE: &str = "PALYRA_BENCH_INSIDE";
/// Addresses: the bridge has .254, replica N has .N.
const SUBNET: &str = "10.77.0";
const BASE_PORT: u16 = 7440;

/// Runs this program once more, inside of new namespaces. Comes back only when it is inside.
pub(crate) fn enter() -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "--partitioned makes network namespaces, which only root may; run it as root, or leave --partitioned 0"
    );
    for tool in ["unshare", "ip", "nft"] {
        let mut command = std::process::Command::new(tool);
        command
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        ensure!(
            command.status().is_ok(),
            "--partitioned needs the program `{tool}`; apt-get install util-linux iproute2 nftables"
        );
    }
    let error = std::process::Command::new("unshare")
        .args(["-n", "-m", "--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    Err(error).context("unshare does not start")
}

/// The namespaces, and what runs in them.
pub(crate) struct Net {
    ids: Vec<u64>,
}

fn name(id: u64) -> String {
    format!("r{id}")
}

impl Net {
    /// Makes a bridge and `count` namespaces with an end of it each.
    pub(crate) async fn build(count: u64) -> Result<Net> {
        let mut script = String::from("set -e\nip link set lo up\nmkdir -p /run/netns\n");
        // A table of namespaces of our own: that of the machine stays as it is.
        script += "mount -t tmpfs none /run/netns\n";
        script += &format!(
            "ip link add br0 type bridge\nip addr add {SUBNET}.254/24 dev br0\nip link set br0 up\n"
        );
        for id in 1..=count {
            let ns = name(id);
            script += &format!(
                "ip netns add {ns}\nip link add v{id} type veth peer name eth0 netns {ns}\n\
                 ip link set v{id} master br0 up\nip -n {ns} link set lo up\n\
                 ip -n {ns} addr add {SUBNET}.{id}/24 dev eth0\nip -n {ns} link set eth0 up\n"
            );
        }
        run("sh", &["-c", &script])
            .await
            .context("the namespaces can't be made")?;
        Ok(Net {
            ids: (1..=count).collect(),
        })
    }

    /// Where the replicas run.
    pub(crate) fn places(&self) -> Vec<Place> {
        let place = |id: &u64| Place {
            host: format!("{SUBNET}.{id}"),
            base_port: BASE_PORT,
            prefix: ["ip", "netns", "exec", &name(*id)].map(str::to_owned).to_vec(),
        };
        self.ids.iter().map(place).collect()
    }

    /// Cuts a replica off: nothing goes in or out any more, but what it says to itself.
    pub(crate) async fn cut(&self, id: u64) -> Result<()> {
        let chain = |hook: &str, way: &str| {
            format!(
                "chain {hook} {{ type filter hook {hook} priority 0; policy drop; {way} \"lo\" accept; }}"
            )
        };
        let rules = format!(
            "table inet cut {{\n{}\n{}\n}}\n",
            chain("input", "iif"),
            chain("output", "oif")
        );
        feed("ip", &["netns", "exec", &name(id), "nft", "-f", "-"], &rules).await
    }

    /// Joins it again.
    pub(crate) async fn heal(&self, id: u64) -> Result<()> {
        run(
            "ip",
            &[
                "netns",
                "exec",
                &name(id),
                "nft",
                "delete",
                "table",
                "inet",
                "cut",
            ],
        )
        .await
    }

    /// A thread inside a replica's namespace.
    pub(crate) fn inside(&self, id: u64) -> Result<Inside> {
        let path = format!("/run/netns/{}", name(id));
        let namespace = std::fs::File::open(&path).with_context(|| format!("no namespace {path}"))?;
        let (tell, told) = mpsc::channel();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name(format!("inside-{}", name(id)))
            .spawn(move || {
                let entered = setns(&namespace, CloneFlags::CLONE_NEWNET).context("setns");
                let runtime = entered.and_then(|()| {
                    Ok(tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()?)
                });
                match runtime {
                    Ok(runtime) => {
                        let _ = tell.send(Ok(runtime.handle().clone()));
                        runtime.block_on(stopped.cancelled());
                    }
                    Err(error) => drop(tell.send(Err(error))),
                }
            })?;
        let handle = told
            .recv()
            .map_err(|_| anyhow!("the thread inside {path} ended"))??;
        Ok(Inside {
            handle,
            _stop: stop.drop_guard(),
        })
    }
}

/// Tasks on it run in one thread, and their sockets are of its namespace.
pub(crate) struct Inside {
    handle: Handle,
    _stop: DropGuard,
}

impl Inside {
    /// Runs something inside, to its end.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        self.handle
            .spawn(work)
            .await
            .context("a task inside a namespace has panicked")
    }
}

async fn run(program: &str, arguments: &[&str]) -> Result<()> {
    feed(program, arguments, "").await
}

async fn feed(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("{program} does not start"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}

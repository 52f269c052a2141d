//! The peer: three members of etcd with TLS between them and to their clients, each with a folder of its own.
//!
//! What lives here: their certificates, processes and clients. Invariants: every connection is mutual TLS over P-256,
//! as ours are; members end with this process, also when it is killed; nothing of etcd's settings is changed but where
//! it listens and what it trusts.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::cluster::{WatchDog, watch_over, write_private};

/// For three new members to elect a leader.
const READY: Duration = Duration::from_secs(60);
const MEMBERS: u16 = 3;

/// The members and their folder, which goes with this value.
pub(crate) struct Etcd {
    dir: tempfile::TempDir,
    ports: u16,
    members: Vec<Child>,
    version: String,
    _watchdog: WatchDog,
}

impl Etcd {
    /// Starts three new members in a folder inside of `parent`.
    pub(crate) async fn start(parent: &Path) -> Result<Etcd> {
        let version = version().await?;
        let dir = tempfile::Builder::new().prefix("etcd-").tempdir_in(parent)?;
        make_certificates(dir.path()).await?;
        let mut etcd = Etcd {
            ports: free_ports()?,
            members: Vec::new(),
            version,
            _watchdog: watch_over(dir.path())?,
            dir,
        };
        for member in 1..=MEMBERS {
            etcd.start_member(member)?;
        }
        etcd.ready().await?;
        Ok(etcd)
    }

    /// What it says of its version.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    fn client_url(&self, member: u16) -> String {
        format!("https://127.0.0.1:{}", self.ports + 2 * member)
    }

    fn peer_url(&self, member: u16) -> String {
        format!("https://127.0.0.1:{}", self.ports + 2 * member + 1)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start_member(&mut self, member: u16) -> Result<()> {
        let cluster: Vec<String> = (1..=MEMBERS)
            .map(|one| format!("m{one}={}", self.peer_url(one)))
            .collect();
        let (client, peer) = (self.client_url(member), self.peer_url(member));
        let log = std::fs::File::create(self.file(&format!("m{member}.log")))?;
        let mut command = Command::new("etcd");
        command.arg("--name").arg(format!("m{member}"));
        command.arg("--data-dir").arg(self.file(&format!("m{member}")));
        command.args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ]);
        command.args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ]);
        command.args([
            "--initial-cluster",
            &cluster.join(","),
            "--initial-cluster-state",
            "new",
        ]);
        for prefix in ["--", "--peer-"] {
            command.arg(format!("{prefix}client-cert-auth"));
            for (flag, file) in [
                ("trusted-ca-file", "ca.pem"),
                ("cert-file", "own.pem"),
                ("key-file", "own.key"),
            ] {
                command.arg(format!("{prefix}{flag}")).arg(self.file(file));
            }
        }
        command.args(["--logger", "zap", "--log-level", "warn"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        let child = command.spawn().context("etcd does not start")?;
        if let Some(pid) = child.id() {
            std::fs::write(self.file(&format!("m{member}.pid")), pid.to_string())?;
        }
        self.members.push(child);
        Ok(())
    }

    async fn ready(&self) -> Result<()> {
        let until = Instant::now() + READY;
        for member in 1..=MEMBERS {
            loop {
                let failure = match self.try_put(member).await {
                    Ok(()) => break,
                    Err(error) => error,
                };
                if Instant::now() >= until {
                    let log = self.file(&format!("m{member}.log"));
                    bail!(
                        "etcd takes no write within {} s: {failure:#}; see {}",
                        READY.as_secs(),
                        log.display()
                    );
                }
                sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    async fn try_put(&self, member: u16) -> Result<()> {
        let mut client = self.client(member).await?;
        client.put("ready", "", None).await?;
        Ok(())
    }

    /// A connection of its own to one member: `1` to `3`, and around.
    pub(crate) async fn client(&self, number: u16) -> Result<Client> {
        let member = number.saturating_sub(1) % MEMBERS + 1;
        let read = |name: &str| std::fs::read(self.file(name));
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read("ca.pem")?))
            .identity(Identity::from_pem(read("own.pem")?, read("own.key")?));
        let options = ConnectOptions::new()
            .with_tls(tls)
            .with_timeout(Duration::from_secs(15));
        Ok(Client::connect([self.client_url(member)], Some(options)).await?)
    }

    /// Ends the members.
    pub(crate) async fn stop(mut self) -> Result<()> {
        for mut member in self.members.drain(..) {
            member.kill().await?;
        }
        Ok(())
    }
}

async fn version() -> Result<String> {
    let output = Command::new("etcd").arg("--version").output().await.context(
        "etcd does not start: install it (Debian's package etcd-server), or leave out --against etcd",
    )?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = said.lines().find_map(|line| line.strip_prefix("etcd Version: "));
    Ok(version.unwrap_or("of an unknown version").to_owned())
}

/// An authority and one certificate for all: servers, members and clients.
async fn make_certificates(dir: &Path) -> Result<()> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority_certificate = authority.self_signed(&authority_key)?;
    let issuer = Issuer::new(authority, &authority_key);
    let key = KeyPair::generate()?;
    let mut own = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    own.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    own.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let certificate = own.signed_by(&key, &issuer)?;
    std::fs::write(dir.join("ca.pem"), authority_certificate.pem())?;
    std::fs::write(dir.join("own.pem"), certificate.pem())?;
    write_private(&dir.join("own.key"), key.serialize_pem().as_bytes()).await
}

/// A base such that the members' ports are free now.
fn free_ports() -> Result<u16> {
    let seed = u16::try_from(std::process::id() % 500).unwrap_or(0);
    let free = |base: &u16| (2..8u16).all(|port| TcpListener::bind(("127.0.0.1", base + port)).is_ok());
    (0..500u16)
        .map(|step| 28_000 + (seed + step * 7) % 500 * 8)
        .find(free)
        .context("no ports for etcd are free between 28000 and 32000")
}

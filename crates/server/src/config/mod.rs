//! The configuration file of a replica, `palyrad.toml`.
//!
//! What never lives here: secrets (they are in files of the data folder) and anything that the cluster agrees
//! on by its log. Invariants: an unknown key, a value out of bounds or an address that is none is refused
//! with file, line and key; everything but the identity of the replica has a default; every duration and size
//! has bounds.

mod explain;
mod quantity;
mod quic;

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use palyra_pki::{TrustDomain, identity, layout};
use serde::Deserialize;

use quantity::{Count, Size, Span};
use quic::QuicSection;

/// A configuration file is at most this many bytes.
const MAX_FILE: u64 = 256 * 1024;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Who this replica is.
    pub(crate) replica: ReplicaSection,
    /// Where it listens.
    #[serde(default)]
    pub(crate) listen: ListenSection,
    /// Where others reach it.
    #[serde(default)]
    pub(crate) advertise: AdvertiseSection,
    /// Bounds of connections and messages.
    #[serde(default)]
    pub(crate) limits: LimitsSection,
    /// Bounds of QUIC.
    #[serde(default)]
    pub(crate) quic: QuicSection,
    /// Times.
    #[serde(default)]
    pub(crate) timers: TimersSection,
    /// How long certificates live.
    #[serde(default)]
    pub(crate) certificates: CertificatesSection,
    /// The Raft group.
    #[serde(default)]
    pub(crate) raft: RaftSection,
    /// What is logged.
    #[serde(default)]
    pub(crate) log: LogSection,
}

/// Who this replica is; written by `palyra cluster init` and `palyrad join`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReplicaSection {
    /// Given by the cluster, never reused.
    pub(crate) id: u64,
    /// Its name.
    pub(crate) name: String,
    /// The cluster that it belongs to.
    pub(crate) cluster_id: String,
    /// The cluster's trust domain.
    pub(crate) trust_domain: String,
    /// Where its files are, relative to the configuration file; the folder of the configuration file when
    /// absent.
    #[serde(default = "here")]
    pub(crate) data_dir: PathBuf,
}

fn here() -> PathBuf {
    PathBuf::from(".")
}

/// Where it listens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ListenSection {
    /// Address of all listeners but metrics.
    pub(crate) host: String,
    /// First of six ports.
    pub(crate) base_port: u16,
    /// Nodes and operators; `host:port`.
    pub(crate) node: Option<String>,
    /// Enrolment.
    pub(crate) enrol: Option<String>,
    /// Other replicas.
    pub(crate) peers: Option<String>,
    /// Metrics and health; loopback unless set.
    pub(crate) metrics: Option<String>,
    /// Nodes over QUIC (UDP); [`OFF`] for none.
    pub(crate) quic: Option<String>,
}

/// What stands in place of the address of a listener that there is to be none of.
pub(crate) const OFF: &str = "off";

impl Default for ListenSection {
    fn default() -> ListenSection {
        ListenSection {
            host: "127.0.0.1".to_owned(),
            base_port: layout::BASE_PORT,
            node: None,
            enrol: None,
            peers: None,
            metrics: None,
            quic: None,
        }
    }
}

/// Where others reach it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct AdvertiseSection {
    /// Host name or address; the listen address when absent.
    pub(crate) host: Option<String>,
    /// Nodes and operators; `host:port`.
    pub(crate) node: Option<String>,
    /// Enrolment.
    pub(crate) enrol: Option<String>,
    /// Other replicas.
    pub(crate) peers: Option<String>,
    /// Metrics and health.
    pub(crate) metrics: Option<String>,
    /// Nodes over QUIC.
    pub(crate) quic: Option<String>,
}

/// Bounds of connections and messages.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LimitsSection {
    /// Connections per listener.
    pub(crate) connections: Count<16, 1_000_000>,
    /// Connections per listener from one address.
    pub(crate) connections_per_source: Count<4, 1_000_000>,
    /// Handshakes that may be under way on a listener.
    pub(crate) handshakes: Count<4, 10_000>,
    /// Streams that may be open on one connection.
    pub(crate) streams_per_connection: Count<8, 10_000>,
    /// Largest message on the node and enrolment listeners.
    pub(crate) message: Size<{ 640 << 10 }, { 64 << 20 }>,
    /// Sessions of nodes.
    pub(crate) sessions: Count<16, 100_000>,
    /// Attaches that are under way at one time.
    pub(crate) attaches: Count<1, 4_096>,
    /// Nodes that wait for their turn to be attached.
    pub(crate) attach_queue: Count<1, 100_000>,
}

impl Default for LimitsSection {
    fn default() -> LimitsSection {
        const DEFAULT: LimitsSection = LimitsSection {
            connections: Count::of(16_384),
            connections_per_source: Count::of(4_096),
            handshakes: Count::of(256),
            streams_per_connection: Count::of(256),
            message: Size::bytes(1 << 20),
            sessions: Count::of(20_000),
            attaches: Count::of(128),
            attach_queue: Count::of(16_384),
        };
        DEFAULT
    }
}

/// Times.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TimersSection {
    /// A TLS handshake must be done within this.
    pub(crate) handshake: Span<100, 60_000>,
    /// An idle connection is asked for a sign of life this often.
    pub(crate) keepalive: Span<1_000, 600_000>,
    /// It is closed when no sign comes within this.
    pub(crate) keepalive_timeout: Span<500, 120_000>,
    /// How often a node sends a heartbeat.
    pub(crate) heartbeat: Span<200, 600_000>,
    /// The session of a node that sends nothing for this long ends: the node is suspect.
    pub(crate) heartbeat_timeout: Span<1_000, 3_600_000>,
    /// A replica that had no contact with a quorum for this long serves no node.
    pub(crate) max_staleness: Span<1_000, 60_000>,
    /// The sessions of a replica that the leader has not heard of for this long are ended.
    pub(crate) replica_lost_after: Span<1_000, 600_000>,
    /// How long a stop may take.
    pub(crate) shutdown: Span<500, 120_000>,
    /// Over how much of it the goodbyes to nodes are spread.
    pub(crate) drain: Span<0, 110_000>,
    /// A suspect node that does not come back within this is offline.
    pub(crate) suspect_for: Span<1_000, 3_600_000>,
    /// A node that is offline for this long is gone, unless it asked for another time; 0: never.
    pub(crate) lost_after: Span<0, 31_622_400_000>,
}

impl Default for TimersSection {
    fn default() -> TimersSection {
        const DEFAULT: TimersSection = TimersSection {
            handshake: Span::ms(5_000),
            keepalive: Span::ms(10_000),
            keepalive_timeout: Span::ms(10_000),
            heartbeat: Span::ms(2_000),
            heartbeat_timeout: Span::ms(7_000),
            max_staleness: Span::ms(5_000),
            replica_lost_after: Span::ms(5_000),
            shutdown: Span::ms(8_000),
            drain: Span::ms(4_000),
            suspect_for: Span::ms(15_000),
            lost_after: Span::ms(86_400_000),
        };
        DEFAULT
    }
}

/// A second, in milliseconds: the least that a certificate may live.
const LEAST_MS: u64 = 1_000;
/// An hour, in milliseconds.
const HOUR_MS: u64 = 3_600_000;
/// The least that a certificate may live in production: long enough for a renewal that fails to be tried again.
const SENSIBLE: Duration = Duration::from_secs(60);

/// How long certificates live that this replica signs. All replicas should have the same values.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CertificatesSection {
    /// Of nodes.
    pub(crate) node_validity: Span<LEAST_MS, { 30 * 24 * HOUR_MS }>,
    /// Of operators, when nothing else is asked for.
    pub(crate) operator_validity: Span<LEAST_MS, { 366 * 24 * HOUR_MS }>,
    /// Of this replica itself.
    pub(crate) replica_validity: Span<LEAST_MS, { 366 * 24 * HOUR_MS }>,
    /// Allows less than a minute: for tests.
    pub(crate) short_lives: bool,
}

impl Default for CertificatesSection {
    fn default() -> CertificatesSection {
        const DEFAULT: CertificatesSection = CertificatesSection {
            node_validity: Span::ms(24 * HOUR_MS),
            operator_validity: Span::ms(30 * 24 * HOUR_MS),
            replica_validity: Span::ms(30 * 24 * HOUR_MS),
            short_lives: false,
        };
        DEFAULT
    }
}

/// The Raft group. All replicas should have the same values.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RaftSection {
    /// How often the leader sends a heartbeat.
    pub(crate) heartbeat: Span<20, 5_000>,
    /// Shortest time without a heartbeat after which a replica stands for election.
    pub(crate) election_min: Span<100, 30_000>,
    /// Longest time.
    pub(crate) election_max: Span<200, 60_000>,
    /// A snapshot is made after this many entries.
    pub(crate) snapshot_entries: Count<100, 10_000_000>,
    /// So many entries stay in the log behind a snapshot: a replica that is further behind is sent the snapshot.
    pub(crate) log_entries: Count<10, 10_000_000>,
}

impl Default for RaftSection {
    fn default() -> RaftSection {
        const DEFAULT: RaftSection = RaftSection {
            heartbeat: Span::ms(100),
            election_min: Span::ms(450),
            election_max: Span::ms(850),
            snapshot_entries: Count::of(50_000),
            log_entries: Count::of(100_000),
        };
        DEFAULT
    }
}

/// What is logged, to standard error.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LogSection {
    /// A level, or a filter like `info,palyra_control=debug`.
    pub(crate) level: String,
    /// Lines of text, or JSON.
    pub(crate) format: LogFormat,
}

impl Default for LogSection {
    fn default() -> LogSection {
        LogSection {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// The addresses of a replica's listeners, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// Nodes and operators.
    pub(crate) node: String,
    /// Enrolment.
    pub(crate) enrol: String,
    /// Other replicas.
    pub(crate) peers: String,
    /// Metrics and health.
    pub(crate) metrics: String,
    /// Nodes over QUIC; empty when there is no such listener.
    pub(crate) quic: String,
}

/// Why a configuration is refused; the text names the file, and line and key when one is to blame.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConfigError(pub(crate) String);

/// The key that is to blame, and why.
type Problem = (&'static str, String);

impl Config {
    /// Reads and checks a file.
    pub(crate) fn load(path: &Path) -> Result<Config, ConfigError> {
        let refuse = |error: std::io::Error| {
            ConfigError(format!(
                "cannot read the configuration {}: {error}; `palyra cluster init` or `palyrad join` make it",
                path.display()
            ))
        };
        let size = std::fs::metadata(path).map_err(refuse)?.len();
        if size > MAX_FILE {
            return Err(ConfigError(format!(
                "{} has {size} bytes; a configuration has at most {MAX_FILE}",
                path.display()
            )));
        }
        let text = std::fs::read_to_string(path).map_err(refuse)?;
        Self::parse(&text, path)
    }

    /// Checks the text of the file at `path`, which names it in messages and is what `data_dir` is relative
    /// to.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let mut config: Config =
            toml::from_str(text).map_err(|error| ConfigError(explain::explain(&error, text, path)))?;
        config.check().map_err(|(key, problem)| {
            let line = explain::line_of(text, key).map_or_else(String::new, |line| format!(":{line}"));
            ConfigError(format!("{}{line}: {key}: {problem}", path.display()))
        })?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let dir = &config.replica.data_dir;
        config.replica.data_dir = if *dir == here() {
            folder.to_owned()
        } else {
            folder.join(dir)
        };
        Ok(config)
    }

    /// What the types can't say.
    fn check(&self) -> Result<(), Problem> {
        self.check_replica()?;
        if u16::MAX - layout::METRICS_PORT < self.listen.base_port || self.listen.base_port < 1024 {
            let cause = format!(
                "{} leaves no room; 1024 to 65530 is allowed",
                self.listen.base_port
            );
            return Err(("listen.base_port", cause));
        }
        self.check_addresses()?;
        self.check_reachable()?;
        let need = |holds: bool, key, rule: &str| {
            if holds {
                Ok(())
            } else {
                Err((key, rule.to_owned()))
            }
        };
        let (timers, raft) = (&self.timers, &self.raft);
        let lives = &self.certificates;
        for (key, life) in [
            ("certificates.node_validity", lives.node_validity.get()),
            ("certificates.operator_validity", lives.operator_validity.get()),
            ("certificates.replica_validity", lives.replica_validity.get()),
        ] {
            need(
                lives.short_lives || life >= SENSIBLE,
                key,
                "less than a minute is for tests; set certificates.short_lives = true if this is one",
            )?;
        }
        need(
            timers.heartbeat_timeout.get() >= 2 * timers.heartbeat.get(),
            "timers.heartbeat_timeout",
            "it must be at least twice timers.heartbeat",
        )?;
        need(
            timers.shutdown.get() > timers.drain.get(),
            "timers.drain",
            "it must be less than timers.shutdown",
        )?;
        need(
            raft.election_min.get() >= 3 * raft.heartbeat.get(),
            "raft.election_min",
            "it must be at least three times raft.heartbeat",
        )?;
        need(
            raft.election_max.get() > raft.election_min.get(),
            "raft.election_max",
            "it must be more than raft.election_min",
        )?;
        need(
            is_level(&self.log.level),
            "log.level",
            "it must be error, warn, info, debug or trace, or a list like info,palyra_replica=debug",
        )
    }

    fn check_replica(&self) -> Result<(), Problem> {
        let ReplicaSection {
            id,
            name,
            cluster_id,
            trust_domain,
            ..
        } = &self.replica;
        if *id == 0 {
            return Err(("replica.id", "0 is no replica id; the first is 1".to_owned()));
        }
        if !identity::is_name(name) {
            return Err((
                "replica.name",
                format!("{name:?} is no name; use a-z, 0-9, '.', '-', '_'"),
            ));
        }
        if !identity::is_ulid(cluster_id) {
            return Err(("replica.cluster_id", format!("{cluster_id:?} is no ULID")));
        }
        TrustDomain::new(trust_domain).map_err(|error| ("replica.trust_domain", error.to_string()))?;
        Ok(())
    }

    /// Others must be told something that they can connect to.
    fn check_reachable(&self) -> Result<(), Problem> {
        let told = self.advertised_addresses();
        for address in [&told.node, &told.enrol, &told.peers, &told.quic] {
            let host = split(address)
                .map_or("", |(host, _)| host)
                .trim_matches(['[', ']']);
            if host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_unspecified())
            {
                let next = "set it to a name or address of this machine that the others reach";
                return Err((
                    "advertise.host",
                    format!("nobody can connect to {address}; {next}"),
                ));
            }
        }
        Ok(())
    }

    fn check_addresses(&self) -> Result<(), Problem> {
        let listen = [
            ("listen.node", &self.listen.node),
            ("listen.enrol", &self.listen.enrol),
            ("listen.peers", &self.listen.peers),
            ("listen.metrics", &self.listen.metrics),
            ("advertise.node", &self.advertise.node),
            ("advertise.enrol", &self.advertise.enrol),
            ("advertise.peers", &self.advertise.peers),
            ("advertise.metrics", &self.advertise.metrics),
            ("listen.quic", &self.listen.quic),
            ("advertise.quic", &self.advertise.quic),
        ];
        for (key, value) in listen {
            if let Some(text) = value
                && !(key == "listen.quic" && text == OFF)
            {
                split(text).ok_or_else(|| (key, format!("{text:?} is no address; write host:port")))?;
            }
        }
        let listens = self.listen_addresses();
        let mut seen: Vec<&String> = Vec::new();
        for address in [&listens.node, &listens.enrol, &listens.peers, &listens.metrics] {
            if seen.contains(&address) {
                return Err(("listen.base_port", format!("{address} is given to two listeners")));
            }
            seen.push(address);
        }
        Ok(())
    }

    /// Where the listeners bind.
    pub(crate) fn listen_addresses(&self) -> Addresses {
        let listen = &self.listen;
        let pick = |own: &Option<String>, host: &str, offset| {
            own.clone()
                .unwrap_or_else(|| layout::address(host, listen.base_port, offset))
        };
        Addresses {
            node: pick(&listen.node, &listen.host, layout::NODE_PORT),
            enrol: pick(&listen.enrol, &listen.host, layout::ENROL_PORT),
            peers: pick(&listen.peers, &listen.host, layout::PEERS_PORT),
            metrics: pick(&listen.metrics, "127.0.0.1", layout::METRICS_PORT),
            quic: match listen.quic.as_deref() {
                Some(OFF) => String::new(),
                _ => pick(&listen.quic, &listen.host, layout::QUIC_PORT),
            },
        }
    }

    /// What others are told: an own address where one is set, else the advertised host with the port listened
    /// on.
    pub(crate) fn advertised_addresses(&self) -> Addresses {
        let listens = self.listen_addresses();
        let host = self.advertise.host.as_deref();
        let pick = |own: &Option<String>, listen: &str| match (own, host) {
            (Some(own), _) => own.clone(),
            (None, Some(host)) => layout::address(host, split(listen).map_or(0, |(_, port)| port), 0),
            (None, None) => listen.to_owned(),
        };
        Addresses {
            node: pick(&self.advertise.node, &listens.node),
            enrol: pick(&self.advertise.enrol, &listens.enrol),
            peers: pick(&self.advertise.peers, &listens.peers),
            metrics: self
                .advertise
                .metrics
                .clone()
                .unwrap_or_else(|| listens.metrics.clone()),
            quic: if listens.quic.is_empty() {
                String::new()
            } else {
                pick(&self.advertise.quic, &listens.quic)
            },
        }
    }

    /// The names and addresses that the replica's certificate carries.
    pub(crate) fn host_names(&self) -> palyra_pki::ca::HostNames {
        let (listens, told) = (self.listen_addresses(), self.advertised_addresses());
        let addresses = [
            &listens.node,
            &listens.enrol,
            &listens.peers,
            &told.node,
            &told.enrol,
            &told.peers,
            &listens.quic,
            &told.quic,
        ];
        palyra_pki::ca::HostNames::from_hosts(
            addresses
                .into_iter()
                .filter_map(|address| Some(split(address)?.0)),
        )
    }
}

/// A level, or several of `target=level` with commas between.
fn is_level(text: &str) -> bool {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    text.split(',')
        .all(|part| LEVELS.contains(&part.rsplit_once('=').map_or(part, |(_, level)| level).trim()))
}

/// Host and port of `host:port`; the port is not 0 and the host not empty.
pub(crate) fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    (!host.is_empty() && (bracketed || !host.contains(':')) && host.len() <= 255).then_some((host, port))
}

/// The first socket address that `address` stands for.
pub(crate) fn resolve(address: &str) -> std::io::Result<SocketAddr> {
    let none = || std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    address.to_socket_addrs()?.next().ok_or_else(none)
}

#[cfg(test)]
mod tests;

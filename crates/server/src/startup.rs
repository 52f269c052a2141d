//! From a configuration to a serving replica, and back to a clean end.
//!
//! The order is what matters here. Up: lock, keys, ports, disk, Raft, peers, genesis, control plane, callers.
//! Down: the leadership, the sessions, the callers, Raft. Invariants: nothing is written before the folder is
//! known to be this replica's; a port that is taken is found before the disk is opened; nobody is served
//! before Raft is up.

use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use palyra_control::{Control, ControlConfig, Keys, Limits as ControlLimits, Timings};
use palyra_pki::{Authority, KeyPair, TrustDomain, layout};
use palyra_replica::transport::AddressBook;
use palyra_replica::{OpenError, PeerTransport, Replica, ReplicaConfig};
use palyra_state::Id;
use palyra_storage::{Engine, EngineError, Options, RocksEngine};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::exit::{Code, Failure};
use crate::files::{self, FolderLock, ReplicaFiles};
use crate::health;
use crate::listener::Stop;
use crate::metered::{Meter, Metered};
use crate::open_files;
use crate::own;
use crate::ports::{self, Sockets};
use crate::quic;
use crate::tls::Tls;
use crate::vault::FileVault;

/// How long a leader may take to hand over when it is told to stop.
const HAND_OVER: Duration = Duration::from_secs(2);
/// How long threads that are about to end may hold the database.
const LET_GO: Duration = Duration::from_secs(2);
/// Pause between two looks whether they do.
const LET_GO_LOOK: Duration = Duration::from_millis(2);
/// How long connections may take to end once everything that used them is over.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// `palyrad check-config`.
pub(crate) fn check(path: &Path) -> Result<(), Failure> {
    let config = Config::load(path)?;
    let files = ReplicaFiles::load(&config)?;
    tls_of(&config, &files)?;
    replica_config(&config)?;
    let (listens, told) = (config.listen_addresses(), config.advertised_addresses());
    println!(
        "{}: replica {} ({}) of cluster {}",
        path.display(),
        config.replica.id,
        config.replica.name,
        config.replica.cluster_id
    );
    for (name, listen, advertised) in [
        ("node", &listens.node, &told.node),
        ("enrol", &listens.enrol, &told.enrol),
        ("peers", &listens.peers, &told.peers),
        ("metrics", &listens.metrics, &told.metrics),
        ("quic", &listens.quic, &told.quic),
    ] {
        if listen.is_empty() {
            println!("  {name:<8} is off");
            continue;
        }
        println!("  {name:<8} listens on {listen}, others are told {advertised}");
    }
    Ok(())
}

/// The database, held until nobody else uses it. Who lets go last closes it; when another thread does so while the
/// process exits, RocksDB finds its own statics gone and ends the process with an abort.
#[derive(Default)]
pub(crate) struct Database(OnceLock<Arc<dyn Engine>>);

impl Database {
    /// Closes it, as soon as the threads that are about to end have let go of it.
    pub(crate) fn close(self) {
        let Some(engine) = self.0.into_inner() else {
            return;
        };
        let waited = palyra_platform::Stopwatch::start();
        while Arc::strong_count(&engine) > 1 {
            if waited.elapsed() > LET_GO {
                tracing::warn!("the database is in use still; it is left as after a crash");
                return;
            }
            std::thread::sleep(LET_GO_LOOK);
        }
    }
}

/// `palyrad run`: serves until it is told to stop.
pub(crate) async fn run(config: Config, database: &Database) -> Result<(), Failure> {
    open_files::provide(&config.limits);
    let mut signals = Signals::new()?;
    let mut running = tokio::select! {
        started = start(&config, database) => started?,
        name = signals.next() => {
            tracing::info!(signal = name, "told to stop before it served");
            return Ok(());
        }
    };
    // Whoever started this process may not listen any more; that is no reason to end.
    let _ = writeln!(std::io::stdout(), "{}", running.ready_line(&config));
    let ended = running.wait(&mut signals).await;
    tokio::select! {
        () = running.stop() => {}
        () = tokio::time::sleep(config.timers.shutdown.get()) => {
            tracing::warn!("the stop took longer than timers.shutdown; what is left ends with the process");
        }
        name = signals.next() => tracing::warn!(signal = name, "told to stop again: ending at once"),
    }
    ended
}

/// A replica that serves.
struct Running {
    control: Control,
    replica: Replica,
    /// Ends what callers use.
    stop: Stop,
    /// Ends what other replicas and health checks use, last.
    stop_peers: Stop,
    tasks: TaskTracker,
    /// The first thing that went wrong for good.
    failed: watch::Receiver<Option<Failure>>,
    _lock: FolderLock,
}

async fn start(config: &Config, database: &Database) -> Result<Running, Failure> {
    let dir = &config.replica.data_dir;
    let lock = FolderLock::take(dir).map_err(|error| Failure::new(Code::InUse, error))?;
    let files = ReplicaFiles::load(config)?;
    let tls = Arc::new(tls_of(config, &files)?);
    let Sockets {
        node,
        enrol,
        peers,
        metrics,
        quic,
    } = Sockets::bind(&config.listen_addresses()).await?;
    let meter = Arc::new(Meter::default());
    let book = AddressBook::cached(dir.join(layout::PEERS));
    let transport = ports::transport(&tls, &book);
    let replica = open_replica(config, database, &meter, transport).await?;
    let control = start_control(config, files, &tls, &replica)?;

    let (stop, stop_peers) = (Stop::default(), Stop::default());
    let (fail, failed) = watch::channel(None);
    let serving = Serving {
        tasks: TaskTracker::new(),
        fail,
    };
    serving.run(
        "the listener for replicas",
        &stop_peers,
        ports::serve_peers(config, &tls, peers, &replica, &stop_peers),
    );
    replica.start();
    birth(dir, &replica).await?;

    serving.run(
        "the listener for nodes and operators",
        &stop,
        ports::serve_node(config, &tls, node, &control, &stop)?,
    );
    let quic_meter = Arc::new(quic::Meter::default());
    if let Some(socket) = quic {
        let served = quic::serve(config, &tls, socket, &control, &quic_meter, &stop)?;
        serving.run("the QUIC listener", &stop, served);
    }
    serving.run(
        "the enrolment listener",
        &stop,
        ports::serve_enrol(config, &tls, enrol, &control, &stop),
    );
    let source = health::source(control.clone(), replica.clone(), meter, quic_meter);
    let listed = control.clone();
    let lists: crate::crl::Lists = Arc::new(move || listed.crls());
    let http = crate::http::serve(metrics, source, lists, stop_peers.gently.clone());
    let http = async move { Ok(http.await?) };
    serving.run("the metrics listener", &stop_peers, http);
    serving.look_after(
        "the care for addresses",
        own::look_after(config, replica.clone(), book, stop.gently.clone()),
    );
    serving.look_after(
        "the renewal of certificates",
        chores(replica.clone(), control.clone(), tls, stop.gently.clone()),
    );
    Ok(Running {
        control,
        replica,
        stop,
        stop_peers,
        tasks: serving.tasks,
        failed,
        _lock: lock,
    })
}

/// What goes on beside the listeners until the replica stops: telling what changes, and certificates.
async fn chores(
    replica: Replica,
    control: Control,
    tls: Arc<Tls>,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let telling = own::tell_changes(replica);
    let announcing = own::announce_certificate(control, Arc::clone(&tls));
    let all = async move { tokio::join!(telling, announcing, tls.keep_fresh()) };
    Box::pin(stop.run_until_cancelled(all)).await;
    Ok(())
}

fn start_control(
    config: &Config,
    files: ReplicaFiles,
    tls: &Arc<Tls>,
    replica: &Replica,
) -> Result<Control, Failure> {
    let settings = control_config(config)?;
    let vault = FileVault::new(config, settings.trust_domain.clone(), Arc::clone(tls));
    let keys = keys_of(files)?;
    Ok(Control::start_with(
        settings,
        replica.clone(),
        keys,
        Arc::new(vault),
    ))
}

/// Opens the database, and the replica on it.
async fn open_replica(
    config: &Config,
    database: &Database,
    meter: &Arc<Meter>,
    transport: Arc<dyn PeerTransport>,
) -> Result<Replica, Failure> {
    let dir = &config.replica.data_dir;
    files::refuse_lost_database(dir)?;
    let engine = open_engine(dir, meter).await?;
    // Set once: a process opens one.
    let _ = database.0.set(Arc::clone(&engine));
    let opened = Replica::open(replica_config(config)?, engine, transport).await;
    let replica = opened.map_err(|error| open_failure(&error))?;
    files::mark_started(dir)?;
    Ok(replica)
}

fn keys_of(files: ReplicaFiles) -> Result<Keys, Failure> {
    Ok(Keys {
        authority: copy(&files.authority)?,
        kek: files.kek,
    })
}

/// Tasks without which the replica can't go on.
struct Serving {
    tasks: TaskTracker,
    fail: watch::Sender<Option<Failure>>,
}

impl Serving {
    /// Runs a listener; when it ends before it is told to, the process ends too.
    fn run(
        &self,
        what: &'static str,
        stop: &Stop,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let stop = stop.gently.clone();
        self.look_after(what, async move {
            let why = match task.await {
                Err(error) => format!("{error:#}"),
                Ok(()) if stop.is_cancelled() => return Ok(()),
                Ok(()) => "nobody told it to".to_owned(),
            };
            Err(Failure::new(
                Code::Internal,
                format!("{what} ended: {why}; see the log"),
            ))
        });
    }

    /// Runs a task; when it fails or panics, the process ends with that failure, unless another was first.
    fn look_after(
        &self,
        what: &'static str,
        task: impl Future<Output = Result<(), Failure>> + Send + 'static,
    ) {
        let fail = self.fail.clone();
        let running = tokio::spawn(task);
        self.tasks.spawn(async move {
            let ended = running.await.unwrap_or_else(|error| {
                let message = format!("{what} has panicked; see the log, and start the replica again");
                if error.is_panic() {
                    Err(Failure::new(Code::Internal, message))
                } else {
                    Ok(())
                }
            });
            if let Err(failure) = ended {
                fail.send_if_modified(|first| {
                    let is_first = first.is_none();
                    first.get_or_insert(failure);
                    is_first
                });
            }
        });
    }
}

impl Running {
    fn ready_line(&self, config: &Config) -> String {
        let listens = config.listen_addresses();
        format!(
            "palyrad ready replica={} node={} enrol={} peers={} metrics={} quic={}",
            self.replica.id(),
            listens.node,
            listens.enrol,
            listens.peers,
            listens.metrics,
            if listens.quic.is_empty() {
                "off"
            } else {
                &listens.quic
            },
        )
    }

    /// Serves until it is told to stop, or can't go on.
    async fn wait(&mut self, signals: &mut Signals) -> Result<(), Failure> {
        tokio::select! {
            name = signals.next() => {
                tracing::info!(signal = name, "stopping");
                Ok(())
            }
            failed = self.failed.wait_for(Option::is_some) => {
                let failure = failed.ok().and_then(|failure| failure.clone());
                Err(failure.unwrap_or_else(|| Failure::new(Code::Internal, "a listener ended")))
            }
        }
    }

    /// Leaves in good order: others take over before anything is closed here.
    async fn stop(self) {
        if self.replica.leads() {
            match tokio::time::timeout(HAND_OVER, self.replica.transfer_leader(None)).await {
                Ok(Ok(())) => tracing::info!("handed the leadership over"),
                Ok(Err(error)) => tracing::info!(%error, "the leadership was not handed over"),
                Err(_) => tracing::info!("nobody took the leadership over in time"),
            }
        }
        self.control.shutdown().await;
        tracing::debug!("sessions have ended");
        self.stop.gently.cancel();
        self.replica.shutdown().await;
        tracing::debug!("the replica has stopped");
        self.stop_peers.gently.cancel();
        self.stop.now.cancel();
        self.stop_peers.now.cancel();
        self.tasks.close();
        if tokio::time::timeout(LAST_WORDS, self.tasks.wait()).await.is_err() {
            tracing::debug!("some connections end with the process");
        }
    }
}

/// What the process is told from outside.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals, Failure> {
        let listen =
            |kind| signal(kind).map_err(|error| Failure::new(Code::Internal, format!("no signals: {error}")));
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn tls_of(config: &Config, files: &ReplicaFiles) -> Result<Tls, Failure> {
    let authority = Arc::new(copy(&files.authority)?);
    let tls = Tls::with_certificates(
        authority,
        files.own.clone(),
        files.trust.clone(),
        config.replica.id,
        config.host_names(),
        config.certificates.replica_validity.get(),
    );
    tls.map_err(|error| {
        let path = config.replica.data_dir.join(layout::AUTHORITY_CERT);
        let next = "is the machine's clock right? is it the certificate of this replica and this cluster?";
        Failure::new(
            Code::Auth,
            format!("{} can't be used: {error:#}; {next}", path.display()),
        )
    })
}

/// The issuing key has two users, TLS and the control plane, and is no value to be copied by accident.
fn copy(authority: &Authority) -> Result<Authority, Failure> {
    let key = KeyPair::from_pkcs8(authority.key().to_pkcs8()).map_err(anyhow::Error::from)?;
    Ok(Authority::new(authority.der().to_vec(), key).map_err(anyhow::Error::from)?)
}

async fn open_engine(dir: &Path, meter: &Arc<Meter>) -> Result<Arc<dyn Engine>, Failure> {
    let path = dir.join(layout::DB);
    files::make_private_dir(&path)?;
    // It replays its log, which may take seconds.
    let opened = tokio::task::spawn_blocking(move || RocksEngine::open(&path, Options::default())).await;
    match opened.map_err(anyhow::Error::from)? {
        Ok(engine) => Ok(Arc::new(Metered::new(engine, Arc::clone(meter)))),
        Err(error @ EngineError::Future { .. }) => Err(Failure::new(Code::Unsupported, error)),
        Err(error) => Err(Failure::new(Code::Damaged, error)),
    }
}

fn open_failure(error: &OpenError) -> Failure {
    let code = match error {
        OpenError::FromTheFuture { .. } => Code::Unsupported,
        OpenError::Config(_) => Code::Usage,
        OpenError::NotOurs { .. } => Code::Foreign,
        OpenError::Damaged(_) | OpenError::Storage(_) => Code::Damaged,
    };
    Failure::new(code, error)
}

fn cluster_id(config: &Config) -> Result<Id, Failure> {
    let text = &config.replica.cluster_id;
    Id::parse(text)
        .ok_or_else(|| Failure::new(Code::Usage, format!("replica.cluster_id: {text:?} is no ULID")))
}

fn replica_config(config: &Config) -> Result<ReplicaConfig, Failure> {
    let mut replica = ReplicaConfig::new(config.replica.id, cluster_id(config)?);
    replica.timing.heartbeat = config.raft.heartbeat.get();
    replica.timing.election_min = config.raft.election_min.get();
    replica.timing.election_max = config.raft.election_max.get();
    replica.compaction.snapshot_every = config.raft.snapshot_entries.get();
    replica.compaction.keep = config.raft.log_entries.get();
    // A batch that is larger than what is kept would wait for more than that to be purgeable.
    replica.compaction.purge_batch = replica.compaction.purge_batch.min(replica.compaction.keep);
    Ok(replica)
}

fn control_config(config: &Config) -> Result<ControlConfig, Failure> {
    let timings = Timings {
        heartbeat_interval: config.timers.heartbeat.get(),
        heartbeat_timeout: config.timers.heartbeat_timeout.get(),
        max_staleness: config.timers.max_staleness.get(),
        replica_lost_after: config.timers.replica_lost_after.get(),
        suspect_for: config.timers.suspect_for.get(),
        lost_after: Some(config.timers.lost_after.get()).filter(|span| !span.is_zero()),
        drain: config.timers.drain.get(),
        node_validity: config.certificates.node_validity.get(),
        operator_validity: config.certificates.operator_validity.get(),
        ..Timings::default()
    };
    timings
        .check()
        .map_err(|error| Failure::new(Code::Usage, error))?;
    let domain = TrustDomain::new(&config.replica.trust_domain).map_err(anyhow::Error::from)?;
    Ok(ControlConfig {
        replica_id: config.replica.id,
        cluster_id: cluster_id(config)?,
        trust_domain: domain,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        timings,
        limits: control_limits(config),
    })
}

fn control_limits(config: &Config) -> ControlLimits {
    let defaults = ControlLimits::default();
    let sessions = config.limits.sessions.len();
    ControlLimits {
        sessions,
        // A node that comes back may do so before its old connection is known to be dead; operators need some, too.
        connections: defaults.connections.max(2 * sessions + 1_024),
        attaches: config.limits.attaches.len(),
        attach_queue: config.limits.attach_queue.len(),
        ..defaults
    }
}

/// Founds the cluster when the folder still holds its first entry.
async fn birth(dir: &Path, replica: &Replica) -> Result<(), Failure> {
    let path = dir.join(layout::GENESIS);
    if !path.exists() {
        return Ok(());
    }
    let bytes = files::read(&path)?;
    let genesis = palyra_state::decode(&bytes).map_err(|error| {
        Failure::new(
            Code::Precondition,
            format!("{}: {error}; run `palyra cluster init` again", path.display()),
        )
    })?;
    palyra_control::found(replica, genesis).await.map_err(|error| {
        let next =
            "if the cluster lives elsewhere, remove the file; else `palyra cluster init` in a new folder";
        let what = format!("{}: the cluster was not founded", path.display());
        Failure::new(Code::Precondition, format!("{what}: {error}; {next}"))
    })?;
    tracing::info!("the cluster is founded");
    Ok(files::remove(&path)?)
}

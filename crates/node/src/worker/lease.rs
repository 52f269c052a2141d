//! One lease from its offer until nothing of it is left: accept, renew once, fetch, place, run, look, send,
//! clean, say so.
//!
//! What never lives here: the session and its messages' fate (see `desk`): what is called here is answered
//! sometime, maybe in a later session, at another replica.
//!
//! Invariants: nothing runs before the acceptance and a renewal that was sent after it were confirmed;
//! nothing runs after the last confirmed deadline; outputs are looked at when nothing runs any more; the
//! cleanup comes last and is told as it was.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use palyra_client::new_ulid;
use palyra_proto::run::v1::Manifest;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};

use super::config::Config;
use super::execute::{Control, Ended, How};
use super::folder;
use super::inputs::{self, Fetched};
use super::place::Place;
use super::spec::{Arg, Bounds, Spec};
use super::store::{Record, Store};
use super::tools::Measured;
use crate::output::Output;

mod cleanup;
mod verdict;

pub(crate) use cleanup::{clean, owed};
use verdict::{Trouble, paths, stopped, trimmed, verdict};

/// The largest result; see `palyra_state::limits::RUN_RESULT`.
const RESULT_MAX: usize = 256 * 1024;
/// The longest message of a failure, in bytes.
const MESSAGE_MAX: usize = 1_000;
/// Parts of a sandbox that are told, and the longest word about one, in bytes; see `palyra_state::limits`.
const SANDBOX_MAX: usize = 16;
const PART_MAX: usize = 120;

/// What starts tools: wardens, or something else in tests of the protocol.
pub(crate) trait Runner: Send + Sync {
    /// Runs it; see [`super::execute::execute`].
    fn run<'a>(
        &'a self,
        spec: &'a Spec,
        control: &'a mut Control,
        output: &'a Output,
    ) -> futures::future::BoxFuture<'a, std::io::Result<Ended>>;
}

/// What all leases of a worker share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) measured: std::sync::Mutex<Measured>,
    pub(crate) store: Store,
    pub(crate) base: PathBuf,
    pub(crate) device_id: String,
    pub(crate) runner: Box<dyn Runner>,
    pub(crate) said: mpsc::UnboundedSender<Said>,
}

impl Shared {
    pub(crate) fn measured(&self) -> Measured {
        self.measured
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }
}

/// An answer of the control plane.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    Answer(wire::Answer),
    Chunk(wire::ArtifactChunk),
}

/// What the task of a lease says to the desk.
pub(crate) enum Said {
    /// To be sent until it is answered.
    Call {
        lease_id: String,
        request_id: String,
        body: Box<Body>,
        answer: oneshot::Sender<Reply>,
    },
    /// Where it stands: `running`, `finished`, `cleaned`, `unclean`.
    State {
        lease_id: String,
        state: &'static str,
        message: String,
    },
    /// It has been accepted: renew it from now on.
    Accepted(String),
    /// A file is not what was attested: attest anew, with the truth.
    Drifted(String),
    /// What there is was digested anew.
    Measured(Box<Result<Measured, String>>),
    /// Nothing of it is left, and the control plane knows.
    Gone(String),
}

/// What the task of a lease hears.
pub(crate) struct Ears {
    /// The first moment at which nothing of it may run; 0 until a renewal was confirmed.
    pub(crate) kill_at: watch::Receiver<u64>,
    /// Why it is to end.
    pub(crate) stop: watch::Receiver<Option<String>>,
    /// Counts requests to clean again.
    pub(crate) clean: watch::Receiver<u64>,
}

/// The lease is not this worker's any more: nothing is reported of it but that it is clean.
struct Lost;

/// One lease under way.
pub(crate) struct Task {
    pub(crate) shared: Arc<Shared>,
    pub(crate) offer: wire::LeaseOffer,
    pub(crate) ears: Ears,
    pub(crate) output: Arc<Output>,
    pub(crate) record: Record,
    /// What it did that it may not.
    pub(crate) violation: Option<(&'static str, String)>,
}

impl Task {
    /// Carries it out. Ends when nothing of it is left and the control plane knows, or with the worker.
    pub(crate) async fn run(mut self) {
        let lease_id = self.offer.lease_id.clone();
        let finish = match self.accept().await {
            Ok(()) => self.perform().await,
            Err(end) => end,
        };
        if let Ok(finish) = finish {
            self.report(finish).await;
        }
        if let Some((kind, message)) = self.violation.take() {
            self.violate(kind, &message).await;
        }
        clean(&self.shared, self.record, &mut self.ears.clean).await;
        let _ = self.shared.said.send(Said::Gone(lease_id));
    }

    fn say(&self, state: &'static str, message: &str) {
        let (lease_id, message) = (self.offer.lease_id.clone(), message.to_owned());
        let _ = self.shared.said.send(Said::State {
            lease_id,
            state,
            message,
        });
    }

    /// Takes the lease and waits for the first renewal.
    async fn accept(&mut self) -> Result<(), Result<wire::LeaseFinish, Lost>> {
        if let Err(why) = self.fits() {
            return Err(Ok(self.finish(Err(why))));
        }
        // Before anything of it exists.
        let (store, record) = (self.shared.store.clone(), self.record.clone());
        if let Err(error) = blocking(move || store.put(&record).map_err(|error| error.to_string())).await {
            return Err(Ok(self.finish(Err(Trouble::refused("disk", error)))));
        }
        let (lease_id, fence, request_id) = (self.offer.lease_id.clone(), self.offer.fence, new_ulid());
        let body = Body::Accept(wire::LeaseAccept {
            request_id: request_id.clone(),
            lease_id,
            fence,
        });
        match self.call(request_id, body).await {
            Some(Reply::Answer(answer)) if answer.accepted => {}
            Some(Reply::Answer(answer)) => {
                tracing::info!(
                    lease = self.offer.lease_id,
                    code = answer.code,
                    "the lease is not to be had"
                );
                return Err(Err(Lost));
            }
            _ => return Err(Err(Lost)),
        }
        let _ = self.shared.said.send(Said::Accepted(self.offer.lease_id.clone()));
        let mut stop = self.ears.stop.clone();
        tokio::select! {
            biased;
            why = stop.wait_for(Option::is_some) => {
                let _ = why;
                Err(Err(Lost))
            }
            renewed = self.ears.kill_at.wait_for(|at| *at > 0) => renewed.map(|_| ()).map_err(|_| Err(Lost)),
        }
    }

    /// Whether this worker can hold it at all.
    fn fits(&self) -> Result<Bounds, Trouble> {
        let config = &self.shared.config;
        if config.tool(&self.offer.tool).is_none() {
            let message = format!("this worker has no tool {}", self.offer.tool);
            return Err(Trouble::refused("unknown_tool", message));
        }
        let scope = self.offer.scope.clone().unwrap_or_default();
        if !scope.root.is_empty() && !config.workspaces.contains_key(&scope.root) {
            let message = format!("this worker has no workspace {}", scope.root);
            return Err(Trouble::refused("unknown_workspace", message));
        }
        for path in scope.allowed.iter().chain(&scope.read_only) {
            folder::relative(path).map_err(|why| Trouble::refused("scope", why))?;
        }
        let asked = self.offer.limits.unwrap_or_default();
        config
            .bounds(&asked)
            .map_err(|why| Trouble::refused("limits", why))
    }

    async fn perform(&mut self) -> Result<wire::LeaseFinish, Lost> {
        let result = self.attempt().await;
        if matches!(&result, Err(trouble) if trouble.code == "lost") {
            return Err(Lost);
        }
        Ok(match result {
            Ok(finish) => finish,
            Err(trouble) => {
                if trouble.code == "digest_drift" {
                    let _ = self.shared.said.send(Said::Drifted(trouble.message.clone()));
                }
                self.finish(Err(trouble))
            }
        })
    }

    async fn attempt(&mut self) -> Result<wire::LeaseFinish, Trouble> {
        let bounds = self.fits()?;
        let (base, lease_id) = (self.shared.base.clone(), self.offer.lease_id.clone());
        let made =
            blocking(move || Place::make(&base, &lease_id, &bounds).map_err(|error| error.to_string()));
        let place = made.await.map_err(|why| Trouble::refused("disk", why))?;
        self.record.groups.clone_from(&place.groups);
        let (store, record) = (self.shared.store.clone(), self.record.clone());
        let put = blocking(move || store.put(&record).map_err(|error| error.to_string()));
        put.await.map_err(|why| Trouble::refused("disk", why))?;
        self.fetch(&place).await?;
        let spec = self.spec(&place, bounds).await?;
        self.ended_already()?;
        let ended = self.execute(&spec).await?;
        self.judge(&place, ended).await
    }

    fn ended_already(&self) -> Result<(), Trouble> {
        match self.ears.stop.borrow().as_deref() {
            Some(why) => Err(stopped(why, "it was stopped before the program was started")),
            None => Ok(()),
        }
    }

    /// Puts the inputs where they belong.
    async fn fetch(&mut self, place: &Place) -> Result<(), Trouble> {
        let bad = |why: String| Trouble::refused("inputs", why);
        let scope = self.offer.scope.clone().unwrap_or_default();
        for entry in self.offer.inputs.clone().unwrap_or_default().entries {
            if !entry.stored {
                let space = self.shared.config.workspaces.get(&scope.root).cloned();
                let space =
                    space.ok_or_else(|| bad(format!("the input {} is nowhere to be had", entry.path)))?;
                blocking(move || inputs::in_place(&space, &entry))
                    .await
                    .map_err(bad)?;
                continue;
            }
            let mut fetched = Fetched::begin(&place.work(), &entry).map_err(bad)?;
            while let Some(offset) = fetched.next() {
                self.ended_already()?;
                let request_id = new_ulid();
                let body = Body::Get(wire::ArtifactGet {
                    request_id: request_id.clone(),
                    lease_id: self.offer.lease_id.clone(),
                    fence: self.offer.fence,
                    digest: entry.digest.clone(),
                    offset,
                });
                match self.call(request_id, body).await {
                    Some(Reply::Chunk(chunk)) if chunk.code.is_empty() => {
                        fetched.take(chunk.offset, &chunk.chunk).map_err(bad)?;
                    }
                    Some(Reply::Chunk(chunk)) => {
                        return Err(bad(format!("{}: {}", chunk.code, chunk.message)));
                    }
                    Some(Reply::Answer(answer)) => {
                        return Err(bad(format!("{}: {}", answer.code, answer.message)));
                    }
                    None => return Err(stopped("lost", "")),
                }
            }
            blocking(move || fetched.finish()).await.map_err(bad)?;
        }
        Ok(())
    }

    /// Puts the tool's files into place, and says all that its warden must know.
    async fn spec(&mut self, place: &Place, bounds: Bounds) -> Result<Spec, Trouble> {
        let (shared, name, into) = (Arc::clone(&self.shared), self.offer.tool.clone(), place.tool());
        let placed = blocking(move || shared.measured().place(&shared.config, &name, &into)).await;
        let argv: Vec<Arg> = placed.map_err(|why| Trouble::refused("digest_drift", why))?;
        let uid = self.shared.config.uid(self.offer.slot);
        let (there, params) = (place.clone(), self.offer.params.to_vec());
        let filled = blocking(move || there.fill(&params, uid).map_err(|error| error.to_string()));
        filled.await.map_err(|why| Trouble::refused("disk", why))?;
        let config = &self.shared.config;
        let tool = config
            .tool(&self.offer.tool)
            .ok_or_else(|| Trouble::refused("unknown_tool", ""))?;
        let scope = self.offer.scope.clone().unwrap_or_default();
        let (allowed, read_only) = paths(&scope)?;
        let mut spec = Spec {
            lease_id: self.offer.lease_id.clone(),
            kill_at_ms: *self.ears.kill_at.borrow(),
            argv,
            env: self.environment(tool.environment()),
            params: PathBuf::new(),
            tool_dir: PathBuf::new(),
            work_dir: PathBuf::new(),
            root_dir: PathBuf::new(),
            workspace: config.workspaces.get(&scope.root).cloned(),
            allowed,
            read_only,
            image: config.image.root.clone(),
            read: config.read.clone(),
            bounds,
            cgroup_procs: Vec::new(),
            cgroups: Vec::new(),
            uid,
            require: config.require.clone(),
            without: Vec::new(),
        };
        place.describe(&mut spec);
        Ok(spec)
    }

    fn environment(&self, mut env: Vec<(String, String)>) -> Vec<(String, String)> {
        let offer = &self.offer;
        for (name, value) in [
            ("PALYRA_RUN_ID", offer.run_id.clone()),
            ("PALYRA_LEASE_ID", offer.lease_id.clone()),
            ("PALYRA_FENCE", offer.fence.to_string()),
            ("PALYRA_ATTEMPT", offer.attempt.to_string()),
            ("PALYRA_TOOL", offer.tool.clone()),
            ("PALYRA_DEVICE_ID", self.shared.device_id.clone()),
        ] {
            env.push((name.to_owned(), value));
        }
        env
    }

    async fn execute(&mut self, spec: &Spec) -> Result<Ended, Trouble> {
        let tool = self.shared.config.tool(&self.offer.tool);
        let (timeout, grace) = tool.map_or((Duration::ZERO, Duration::ZERO), |tool| {
            (tool.timeout(), tool.grace())
        });
        let mut control = Control {
            kill_at_ms: self.ears.kill_at.clone(),
            stop: self.ears.stop.clone(),
            timeout,
            grace,
            max_result: RESULT_MAX,
        };
        let ran = self.shared.runner.run(spec, &mut control, &self.output).await;
        ran.map_err(|error| Trouble::refused("warden", format!("no warden could be started: {error}")))
    }

    /// What came of it, with its files.
    async fn judge(&mut self, place: &Place, ended: Ended) -> Result<wire::LeaseFinish, Trouble> {
        let mut finish = self.finish(Ok(()));
        let held = ended.sandbox.iter().take(SANDBOX_MAX);
        finish.sandbox = held.map(|part| crate::work::plain(part, PART_MAX)).collect();
        finish.usage = [
            ("cpu_ms", ended.cpu_ms),
            ("max_rss_bytes", ended.max_rss_bytes),
            ("wall_ms", ended.wall_ms),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let verdict = verdict(&ended, place.out_of_memory());
        if verdict.code == "lost" {
            return Err(verdict);
        }
        // Told after the result, and before the cleanup: it ends the lease, and a run should not lose its
        // reason by that.
        if !ended.left.is_empty() {
            let message = format!("processes {:?} of the lease could not be ended", ended.left);
            self.violation = Some(("escape", message));
        } else if verdict.code == "disk_exceeded" {
            self.violation = Some(("disk", verdict.message.clone()));
        }
        finish.outcome = verdict.outcome.to_owned();
        finish.error_code.clone_from(&verdict.code);
        finish.error_message = crate::work::plain(&verdict.message, MESSAGE_MAX);
        if let How::Exited(code) = ended.how {
            finish.exit_code = code;
        }
        if verdict.code.is_empty() {
            finish.result = trimmed(ended.stdout).into();
        }
        if verdict.outcome != "refused" && ended.gone {
            finish.outputs = Some(self.outputs(place).await?);
        }
        Ok(finish)
    }

    /// Looks at the outputs and sends those that the cluster keeps.
    async fn outputs(&mut self, place: &Place) -> Result<Manifest, Trouble> {
        let out = place.work().join("out");
        let looked = out.clone();
        let found = blocking(move || folder::outputs(&looked).map_err(|error| error.to_string())).await;
        let found = found.map_err(|why| Trouble {
            outcome: "failed",
            code: "outputs".to_owned(),
            message: why,
        })?;
        for refused in &found.refused {
            self.output
                .write(format!("palyra: no output: {refused}\n").as_bytes());
        }
        let mut manifest = inputs::manifest(&found.files);
        let mut sent = std::collections::BTreeSet::new();
        for entry in &mut manifest.entries {
            if entry.stored && sent.insert(entry.digest.clone()) && !self.send(&out, entry).await? {
                entry.stored = false;
            }
        }
        Ok(manifest)
    }

    /// Sends one file. False when the cluster does not keep it.
    async fn send(
        &mut self,
        out: &std::path::Path,
        entry: &palyra_proto::run::v1::ManifestEntry,
    ) -> Result<bool, Trouble> {
        let mut offset = 0;
        while offset < entry.size {
            let (out, entry) = (out.to_owned(), entry.clone());
            let (digest, size, path) = (entry.digest.clone(), entry.size, entry.path.clone());
            let piece = blocking(move || inputs::piece(&out, &entry, offset)).await;
            let chunk = piece.map_err(|why| Trouble {
                outcome: "failed",
                code: "outputs".to_owned(),
                message: why,
            })?;
            let (length, request_id) = (chunk.len() as u64, new_ulid());
            let body = Body::Put(wire::ArtifactPut {
                request_id: request_id.clone(),
                lease_id: self.offer.lease_id.clone(),
                fence: self.offer.fence,
                digest,
                size,
                offset,
                chunk: chunk.into(),
            });
            match self.call(request_id, body).await {
                Some(Reply::Answer(answer)) if answer.accepted => {}
                Some(Reply::Answer(answer)) => {
                    let text = format!("palyra: {path} is not kept: {} {}\n", answer.code, answer.message);
                    self.output.write(text.as_bytes());
                    return Ok(false);
                }
                _ => return Err(stopped("lost", "")),
            }
            offset += length;
        }
        Ok(true)
    }

    async fn violate(&mut self, kind: &str, message: &str) {
        let request_id = new_ulid();
        let body = Body::Violation(wire::Violation {
            request_id: request_id.clone(),
            lease_id: self.offer.lease_id.clone(),
            fence: self.offer.fence,
            kind: kind.to_owned(),
            message: crate::work::plain(message, MESSAGE_MAX),
        });
        if let Some(Reply::Answer(answer)) = self.call(request_id, body).await
            && !answer.accepted
        {
            tracing::warn!(
                lease = self.offer.lease_id,
                code = answer.code,
                "the violation was not taken"
            );
        }
    }

    fn finish(&self, trouble: Result<(), Trouble>) -> wire::LeaseFinish {
        let mut finish = wire::LeaseFinish {
            request_id: new_ulid(),
            lease_id: self.offer.lease_id.clone(),
            fence: self.offer.fence,
            ..wire::LeaseFinish::default()
        };
        if let Err(trouble) = trouble {
            finish.outcome = trouble.outcome.to_owned();
            finish.error_code = trouble.code;
            finish.error_message = crate::work::plain(&trouble.message, MESSAGE_MAX);
        }
        finish
    }

    /// Tells the result, until it is answered. It is on disk before.
    async fn report(&mut self, mut finish: wire::LeaseFinish) {
        finish.log_tail = self.output.tail().into_bytes().into();
        if finish.error_code == "worker_stopped" && self.offer.effect == "idempotent" {
            // Given back: another worker may run it again.
            finish.outcome = "cancelled".to_owned();
        }
        self.record.finish = Some(hex::encode(finish.encode_to_vec()));
        let (store, record) = (self.shared.store.clone(), self.record.clone());
        if let Err(error) = blocking(move || store.put(&record).map_err(|error| error.to_string())).await {
            tracing::error!(lease = self.offer.lease_id, %error, "the result could not be written down");
        }
        self.say("finished", "");
        let request_id = finish.request_id.clone();
        let answered = self.call(request_id, Body::Finish(finish)).await;
        if let Some(Reply::Answer(answer)) = answered
            && !answer.accepted
        {
            tracing::warn!(
                lease = self.offer.lease_id,
                code = answer.code,
                answer.message,
                "the result was refused"
            );
        }
        self.record.finish = None;
    }

    /// Asks the control plane; nothing when the lease is not this worker's any more.
    async fn call(&mut self, request_id: String, body: Body) -> Option<Reply> {
        call(&self.shared, &self.offer.lease_id, request_id, body).await
    }
}

async fn call(shared: &Shared, lease_id: &str, request_id: String, body: Body) -> Option<Reply> {
    let (answer, answered) = oneshot::channel();
    let lease_id = lease_id.to_owned();
    shared
        .said
        .send(Said::Call {
            lease_id,
            request_id,
            body: Box::new(body),
            answer,
        })
        .ok()?;
    answered.await.ok()
}

/// Work on files beside the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| error.to_string())?
}

//! The line of a node to a replica: a session of the real control plane, carried by tasks of that replica as a server's
//! stream would be, without TLS and framing.
//!
//! Messages take their time in both directions and stay in order. A line can be held: nothing passes for a while, as
//! when the node's own network is cut, and then all of it comes at once, or the session is over. When the replica dies,
//! the line breaks. Never here: what is said on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use palyra_control::{
    AttachRequest, Attached, Control, Error, Inbound, Outbound, Outgoing, Session, Transport,
};
use palyra_pki::PeerIdentity;
use palyra_platform as platform;
use palyra_state::Id;
use tokio::sync::{mpsc, oneshot};

use crate::chance;
use crate::cluster::Cluster;
use crate::world::World;

/// Virtual milliseconds that a message takes at most.
const LATENCY_MS: u64 = 6;

/// A node's end of its line.
pub(crate) struct Line {
    /// The replica at the other end.
    pub(crate) at: u64,
    /// What it said first.
    pub(crate) attached: Attached,
    to: mpsc::UnboundedSender<Inbound>,
    from: mpsc::UnboundedReceiver<Outbound>,
    held_until: Arc<AtomicU64>,
    world: &'static World,
}

/// The replica's end.
struct Stream {
    peer: PeerIdentity,
    device: String,
    inbox: mpsc::UnboundedReceiver<Inbound>,
    outbox: mpsc::UnboundedSender<Outbound>,
    held_until: Arc<AtomicU64>,
    world: &'static World,
}

impl Line {
    /// Attaches at a replica; `held` says which attempts of which dispatches the node has. `None` when it is gone,
    /// refuses, or nobody knows.
    pub(crate) async fn open(
        cluster: &Cluster,
        at: u64,
        peer: PeerIdentity,
        device: Id,
        held: &[(Id, u32)],
    ) -> Option<Line> {
        let (life, control) = cluster.control(at)?;
        let (to, inbox) = mpsc::unbounded_channel();
        let (outbox, from) = mpsc::unbounded_channel();
        let held_until = Arc::new(AtomicU64::new(0));
        let stream = Stream {
            peer,
            device: device.to_string(),
            inbox,
            outbox,
            held_until: held_until.clone(),
            world: cluster.world,
        };
        let held = held.to_vec();
        let (told, first) = oneshot::channel();
        platform::scope_sync(life.tag(), || {
            platform::spawn(stream.serve(control, held, told)).detach();
        });
        match first.await {
            Ok(Ok(attached)) => Some(Line {
                at,
                attached,
                to,
                from,
                held_until,
                world: cluster.world,
            }),
            Ok(Err(error)) => {
                cluster
                    .world
                    .note(&format!("r{at}: {device} is not attached: {}", error.code()));
                None
            }
            Err(_) => None,
        }
    }

    /// The session's number.
    pub(crate) fn epoch(&self) -> u64 {
        self.attached.epoch
    }

    /// Says something; false when the line is broken.
    pub(crate) fn say(&self, message: Inbound) -> bool {
        self.to.send(message).is_ok()
    }

    /// What comes next; `Ok(None)` when nothing came in so long, an error when the line is broken.
    pub(crate) async fn hear(&mut self, patience: Duration) -> Result<Option<Outbound>, Broken> {
        match platform::timeout(patience, self.from.recv()).await {
            Ok(Some(Outbound::Goodbye { .. }) | None) => Err(Broken),
            Ok(message) => Ok(message),
            Err(_) => Ok(None),
        }
    }

    /// Lets nothing pass in either direction for so long.
    pub(crate) fn hold(&self, ms: u64) {
        self.world.reach("line-held");
        self.held_until
            .store(self.world.elapsed_ms() + ms, Ordering::Relaxed);
    }
}

/// The line is broken, or the session over.
#[derive(Debug)]
pub(crate) struct Broken;

impl Stream {
    async fn serve(
        mut self,
        control: Control,
        held: Vec<(Id, u32)>,
        told: oneshot::Sender<Result<Attached, Error>>,
    ) {
        self.passes().await;
        let guard = match control.accept(&self.peer, "10.1.0.1") {
            Ok(guard) => guard,
            Err(unwelcome) => return drop(told.send(Err(unwelcome.error))),
        };
        let request = AttachRequest {
            device_id: self.device.clone(),
            held: held.iter().map(|(id, _)| id.to_string()).collect(),
            held_attempts: held.iter().map(|(_, attempt)| *attempt).collect(),
            transport: Transport::Stream,
            fallback: String::new(),
            connection: guard.id(),
        };
        let session = match control.attach(&self.peer, request).await {
            Ok(session) => session,
            Err(error) => return drop(told.send(Err(error))),
        };
        self.passes().await;
        // Who does not wait for it any more is not there to be served.
        if told.send(Ok(session.attached())).is_err() {
            return;
        }
        let outgoing = session.outgoing();
        tokio::select! {
            biased;
            _ = guard.closed() => {}
            () = self.carry(&session, &outgoing) => {}
        }
    }

    /// Carries messages in both directions until either is over.
    async fn carry(&mut self, session: &Session, outgoing: &Outgoing) {
        loop {
            tokio::select! {
                biased;
                message = self.inbox.recv() => {
                    let Some(message) = message else { return };
                    self.passes().await;
                    if session.receive(&self.peer, &self.device, message).await.is_err() {
                        session.refuse();
                    }
                }
                message = outgoing.next() => {
                    let Some(message) = message else { return };
                    self.passes().await;
                    if self.outbox.send(message).is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// The way of one message.
    async fn passes(&self) {
        platform::sleep(Duration::from_millis(chance::below(LATENCY_MS + 1))).await;
        loop {
            let until = self.held_until.load(Ordering::Relaxed);
            let left = until.saturating_sub(self.world.elapsed_ms());
            if left == 0 {
                return;
            }
            platform::sleep(Duration::from_millis(left)).await;
        }
    }
}

//! Workers of tests, and what they are given: a policy, grants, runs.

use bytes::Bytes;
use palyra_control::{
    Challenge, CleanedUp, Control, Error, Finished, FromWorker, HeldLease, Inbound, LeaseName, LeaseRenewed,
    Offer, Outbound, Outgoing, RunView, Session, SetPolicy, Start, Statement, ToWorker,
    WorkerAnswer as Answer,
};
use palyra_pki::attestation::{public_key, sign_statement};
use palyra_replica::Replica;
use palyra_state::access::Role;
use palyra_state::approvals::{CreateGrant, Decide, Risk, Scope};
use palyra_state::fleet::{self, Evidence, Policy, TrustedCapability};
use palyra_state::leases::{self, Lease};
use palyra_state::reply::MustEnd;
use palyra_state::{Actor, Command, Digest, Envelope, Fingerprint, Id, Reply};
use prost::Message as _;

use crate::support::{Cluster, Machine, fresh_id, soon};

/// The tool that workers of tests offer.
pub(crate) const TOOL: &str = "sum";
/// Who vouches for it.
const AUTHORITY: &str = "ops";

fn digest(of: &str) -> Digest {
    Digest::of(of.as_bytes())
}

fn bytes(digest: Digest) -> Bytes {
    digest.to_bytes().to_vec().into()
}

/// What workers of tests meet.
pub(crate) fn policy() -> Policy {
    Policy {
        images: vec![digest("image")],
        builds: vec![digest("build")],
        artifacts: vec![digest("artifact")],
        sdk_protocol_min: 1,
        sdk_protocol_max: 1,
        wit_abis: vec!["0.2.0".to_owned()],
        capabilities: vec![TrustedCapability {
            name: TOOL.to_owned(),
            authorities: vec![AUTHORITY.to_owned()],
            min_evidence: Evidence::SelfReported as i32,
        }],
        max_lease_ttl: 60_000,
        heartbeat_timeout: 15_000,
        max_workers: 1_000,
        leases_per_worker: 64,
        max_attestation_life: 3_600_000,
        ..Policy::default()
    }
}

/// Proposes as somebody, at this replica.
pub(crate) async fn propose(replica: &Replica, actor: Actor, command: impl Into<Command>) -> Reply {
    let committed = soon(replica.propose(Envelope::new(fresh_id(), actor, command)));
    committed.await.unwrap().reply.unwrap()
}

impl Cluster {
    /// The first operator as an actor.
    pub(crate) fn root(&self) -> Actor {
        Actor::Operator {
            name: "root".to_owned(),
            fingerprint: Fingerprint::from_bytes(self.admin.fingerprint),
        }
    }

    pub(crate) async fn hold_workers_to(&self, policy: Policy) -> palyra_control::PolicySet {
        let (now, _) = self.control.fleet_policy(Default::default()).await.unwrap();
        let set = SetPolicy {
            policy,
            expected_version: now.version,
            reason: "a test".to_owned(),
            ..SetPolicy::default()
        };
        self.control
            .set_fleet_policy(&self.operator(), set)
            .await
            .unwrap()
    }

    /// A grant that may be used, of a run that does not exist yet.
    pub(crate) async fn grant(&self) -> Id {
        let (run_id, approval_id) = (fresh_id(), fresh_id());
        let create = CreateGrant {
            grant_id: fresh_id(),
            run_id,
            tool: TOOL.to_owned(),
            session: String::new(),
            ttl_ms: 0,
            summary: "a test".to_owned(),
            risk: Risk::Low as i32,
            approval_id,
        };
        let Reply::GrantCreated(created) = propose(&self.replica, self.root(), create).await else {
            panic!("no grant")
        };
        if created.state() == palyra_state::approvals::GrantState::Pending {
            let decide = Decide {
                approval_id,
                allow: true,
                scope: Scope::Timeboxed as i32,
                ttl_ms: 0,
                reason: String::new(),
            };
            propose(&self.replica, self.root(), decide).await;
        }
        run_id
    }

    /// A run of the tool, with a grant of its own.
    pub(crate) async fn run(&self, start: Start) -> RunView {
        let start = Start {
            run_id: self.grant().await.to_string(),
            tool: TOOL.to_owned(),
            params: Bytes::from_static(b"{\"n\":1}"),
            ..start
        };
        let caller = self.control.admit_operator(&self.admin, Role::Operator).unwrap();
        self.control.start_run(&caller, start).await.unwrap().0
    }

    pub(crate) fn lease_of(&self, run: &RunView) -> Lease {
        let view = self.replica.view();
        let id = leases::run(&view, run.record.id).and_then(|run| run.lease_id);
        leases::lease(&view, id.unwrap()).unwrap()
    }
}

/// A machine that works.
pub(crate) struct Hand {
    pub(crate) machine: Machine,
    pub(crate) session: Session,
    pub(crate) outgoing: Outgoing,
    sequence: u64,
    /// What it was told while it waited for something else.
    aside: std::sync::Mutex<std::collections::VecDeque<ToWorker>>,
}

impl Hand {
    /// In a new session that has said nothing yet.
    pub(crate) async fn attach(machine: Machine, control: &Control) -> Hand {
        let session = machine.attach_at(control, &[]).await.unwrap();
        let outgoing = session.outgoing();
        Hand {
            machine,
            session,
            outgoing,
            sequence: 0,
            aside: std::sync::Mutex::default(),
        }
    }

    /// Paired, attached, reported and attested.
    pub(crate) async fn ready(cluster: &Cluster, name: &str, slots: u32) -> Hand {
        let machine = cluster.node(name).await;
        let mut hand = Hand::attach(machine, &cluster.control).await;
        hand.report(Vec::new()).await;
        hand.attest(slots).await;
        hand
    }

    /// The same machine in another session, at any replica; it has said nothing yet.
    pub(crate) async fn again(self, control: &Control) -> Hand {
        drop(self.session);
        Hand::attach(self.machine, control).await
    }

    pub(crate) fn id(&self) -> Id {
        self.machine.device_id
    }

    pub(crate) async fn send(&self, message: FromWorker) -> Result<(), Error> {
        let device = self.machine.device_id.to_string();
        let inbound = Inbound::Worker(message);
        soon(self.session.receive(self.machine.peer(), &device, inbound)).await
    }

    pub(crate) async fn says(&self, statement: Statement) -> Result<(), Error> {
        self.send(FromWorker::Says {
            request_id: fresh_id().to_string(),
            statement,
        })
        .await
    }

    /// The next thing that it is told as a worker.
    pub(crate) async fn told(&self) -> ToWorker {
        let first = self.aside.lock().unwrap().pop_front();
        match first {
            Some(message) => message,
            None => self.hears().await,
        }
    }

    async fn hears(&self) -> ToWorker {
        match soon(self.outgoing.next()).await {
            Some(Outbound::Worker(message)) => *message,
            other => panic!("{other:?}"),
        }
    }

    /// The next answer. What else comes before it is put aside.
    pub(crate) async fn answer(&self) -> Answer {
        loop {
            match self.hears().await {
                ToWorker::Answer(answer) => return answer,
                other => self.aside.lock().unwrap().push_back(other),
            }
        }
    }

    /// Says something of a lease, which is taken in.
    pub(crate) async fn accepted(&self, statement: Statement) {
        self.says(statement).await.unwrap();
        let answer = self.answer().await;
        assert!(answer.accepted, "{answer:?}");
    }

    /// Says something that is refused for good; answers the code.
    pub(crate) async fn refused(&self, statement: Statement) -> String {
        self.says(statement).await.unwrap();
        let answer = self.answer().await;
        assert!(!answer.accepted && !answer.retry, "{answer:?}");
        answer.code
    }

    pub(crate) async fn report(&self, held: Vec<HeldLease>) -> (Vec<Id>, Vec<MustEnd>) {
        self.says(Statement::Report { held }).await.unwrap();
        match self.told().await {
            ToWorker::Reconciled { keep, end, .. } => (keep, end),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn challenged(&self) -> Challenge {
        match self.told().await {
            ToWorker::Challenge(challenge) => challenge,
            other => panic!("{other:?}"),
        }
    }

    /// What it says of itself over a challenge.
    pub(crate) fn statement(&self, challenge: &Challenge, slots: u32) -> fleet::Statement {
        fleet::Statement {
            cluster_id: challenge.cluster_id.to_bytes().to_vec().into(),
            worker_id: self.id().to_bytes().to_vec().into(),
            nonce: bytes(challenge.nonce),
            image: bytes(digest("image")),
            build: bytes(digest("build")),
            artifact: bytes(digest("artifact")),
            evidence: Evidence::SelfReported as u32,
            capabilities: vec![fleet::ClaimedCapability {
                name: TOOL.to_owned(),
                authority: AUTHORITY.to_owned(),
            }],
            sdk_protocol: 1,
            wit_abi: "0.2.0".to_owned(),
            issued_at: challenge.now_ms,
            expires_at: challenge.now_ms + challenge.max_life_ms,
            slots,
            ..fleet::Statement::default()
        }
    }

    pub(crate) fn signed(&self, statement: &fleet::Statement) -> Statement {
        let encoded = statement.encode_to_vec();
        Statement::Attest {
            signature: sign_statement(&self.machine.key, &encoded).unwrap().into(),
            public_key: public_key(&self.machine.key).into(),
            statement: encoded.into(),
        }
    }

    /// Attests over the challenge that comes next.
    pub(crate) async fn attest(&mut self, slots: u32) {
        let challenge = self.challenged().await;
        let statement = self.signed(&self.statement(&challenge, slots));
        self.says(statement).await.unwrap();
        // What it is given may come before the answer: the state has it then.
        loop {
            match self.hears().await {
                ToWorker::Attested(answer) => return assert!(answer.admitted, "{answer:?}"),
                other => self.aside.lock().unwrap().push_back(other),
            }
        }
    }

    pub(crate) async fn offered(&self) -> Offer {
        match self.told().await {
            ToWorker::Offer(offer) => *offer,
            other => panic!("{other:?}"),
        }
    }

    /// Takes the lease that is offered next.
    pub(crate) async fn takes(&self) -> LeaseName {
        let name = named(&self.offered().await);
        self.accepted(Statement::Accept(name.clone())).await;
        name
    }

    pub(crate) async fn renew(&mut self, leases: &[LeaseName]) -> Vec<LeaseRenewed> {
        self.sequence += 1;
        let sequence = self.sequence;
        let leases = leases.to_vec();
        self.send(FromWorker::Renew { sequence, leases }).await.unwrap();
        match self.told().await {
            ToWorker::Renewed {
                sequence: answered,
                leases,
            } => {
                assert_eq!(answered, sequence);
                leases
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn finishes(&self, lease: &LeaseName) {
        self.accepted(finish(lease)).await;
        self.accepted(cleaned(lease, true)).await;
    }
}

pub(crate) fn named(offer: &Offer) -> LeaseName {
    LeaseName {
        id: offer.lease_id.to_string(),
        fence: offer.fence,
    }
}

pub(crate) fn finish(lease: &LeaseName) -> Statement {
    let finished = Finished {
        outcome: "succeeded".to_owned(),
        exit_code: Some(0),
        result: Bytes::from_static(b"{\"sum\":1}"),
        ..Finished::default()
    };
    Statement::Finish(lease.clone(), Box::new(finished))
}

pub(crate) fn cleaned(lease: &LeaseName, ok: bool) -> Statement {
    let cleaned = CleanedUp {
        ok,
        message: String::new(),
        removed_files: 1,
        removed_bytes: 1,
    };
    Statement::Cleaned(lease.clone(), cleaned)
}

pub(crate) fn held(lease: &LeaseName, state: &str) -> HeldLease {
    HeldLease {
        lease: lease.clone(),
        state: state.to_owned(),
        message: String::new(),
    }
}

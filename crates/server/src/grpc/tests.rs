//! Every method of the listener for nodes and operators, called by everybody who may knock there: who is let in is
//! decided by role and registry, before the request is looked at.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use http::Request;
use palyra_control::{Control, ControlConfig, Keys, Limits, Timings, found};
use palyra_pki::ca::HostNames;
use palyra_pki::seal::Purpose;
use palyra_pki::{
    Authority, IssuedCert, Kek, KeyPair, PeerIdentity, Role as CertificateRole, Root, SpiffeId, TrustDomain,
};
use palyra_replica::testing::Bus;
use palyra_replica::{Replica, ReplicaConfig};
use palyra_state::access::Role;
use palyra_state::cluster::{Addresses, Genesis};
use palyra_state::identity::NewCertificate;
use palyra_state::{Actor, Envelope, Fingerprint, Id};
use palyra_storage::{Disk, MemEngine};
use tonic::Status;
use tonic::service::Routes;
use tower::ServiceExt as _;

use super::Gateway;
use crate::listener::Peer;

/// Who a method is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    Nodes,
    Operators(Role),
}

const NODES: &[&str] = &[
    "palyra.node.v1.NodeService/Register",
    "palyra.node.v1.NodeService/Session",
    "palyra.node.v1.NodeService/Poll",
    "palyra.node.v1.NodeService/Report",
    "palyra.node.v1.NodeService/Renew",
    "palyra.node.v1.NodeService/StreamEvents",
];
const VIEWERS: &[&str] = &[
    "palyra.node.v1.FleetService/ListNodes",
    "palyra.node.v1.FleetService/GetNode",
    "palyra.node.v1.FleetService/ListDevices",
    "palyra.node.v1.FleetService/GetDevice",
    "palyra.node.v1.FleetService/WatchRevocation",
    "palyra.node.v1.FleetService/GetCertificatePolicy",
    "palyra.dispatch.v1.DispatchService/Wait",
    "palyra.dispatch.v1.DispatchService/Logs",
    "palyra.dispatch.v1.DispatchService/Get",
    "palyra.dispatch.v1.DispatchService/List",
    "palyra.journal.v1.JournalService/Tail",
    "palyra.journal.v1.JournalService/Verify",
    "palyra.journal.v1.JournalService/StreamEvents",
    "palyra.access.v1.AccessService/WhoAmI",
    "palyra.access.v1.AccessService/ListOperators",
    "palyra.access.v1.AccessService/RenewCertificate",
    "palyra.access.v1.AccessService/ConfirmCertificate",
    "palyra.cluster.v1.ClusterService/Status",
    "palyra.ca.v1.CaService/Status",
    "palyra.ca.v1.CaService/Trust",
    "palyra.pairing.v1.PairingService/ListCodes",
    "palyra.pairing.v1.PairingService/ListRequests",
    "palyra.pairing.v1.PairingService/GetRequest",
    "palyra.approval.v1.ApprovalService/List",
    "palyra.approval.v1.ApprovalService/Get",
    "palyra.approval.v1.ApprovalService/Wait",
    "palyra.approval.v1.ApprovalService/GetPolicy",
    "palyra.approval.v1.GrantService/List",
    "palyra.approval.v1.GrantService/Get",
    "palyra.worker.v1.WorkerService/ListWorkers",
    "palyra.worker.v1.WorkerService/GetWorker",
    "palyra.worker.v1.WorkerService/GetFleet",
    "palyra.worker.v1.WorkerService/GetPolicy",
    "palyra.run.v1.RunService/GetArtifact",
    "palyra.run.v1.RunService/List",
    "palyra.run.v1.RunService/Get",
    "palyra.run.v1.RunService/Wait",
    "palyra.run.v1.RunService/Logs",
    "palyra.run.v1.LeaseService/ListLeases",
    "palyra.run.v1.LeaseService/GetLease",
];
const OPERATORS: &[&str] = &[
    "palyra.node.v1.FleetService/RevokeDevice",
    "palyra.node.v1.FleetService/RemoveDevice",
    "palyra.node.v1.FleetService/RotateDevice",
    "palyra.node.v1.FleetService/ClearClone",
    "palyra.dispatch.v1.DispatchService/Invoke",
    "palyra.dispatch.v1.DispatchService/Cancel",
    "palyra.pairing.v1.PairingService/MintPin",
    "palyra.pairing.v1.PairingService/MintTicket",
    "palyra.pairing.v1.PairingService/RevokeCode",
    "palyra.pairing.v1.PairingService/Approve",
    "palyra.pairing.v1.PairingService/Reject",
    "palyra.approval.v1.ApprovalService/Decide",
    "palyra.approval.v1.ApprovalService/Withdraw",
    "palyra.approval.v1.GrantService/Create",
    "palyra.approval.v1.GrantService/Revoke",
    "palyra.worker.v1.WorkerService/Quarantine",
    "palyra.worker.v1.WorkerService/Reverify",
    "palyra.worker.v1.WorkerService/Release",
    "palyra.worker.v1.WorkerService/Drain",
    "palyra.worker.v1.WorkerService/Cleanup",
    "palyra.worker.v1.WorkerService/Reap",
    "palyra.run.v1.RunService/Start",
    "palyra.run.v1.RunService/PutArtifact",
    "palyra.run.v1.RunService/Cancel",
    "palyra.run.v1.LeaseService/RevokeLease",
];
const ADMINS: &[&str] = &[
    "palyra.access.v1.AccessService/AddOperator",
    "palyra.access.v1.AccessService/RemoveOperator",
    "palyra.access.v1.AccessService/RevokeCertificate",
    "palyra.node.v1.FleetService/PurgeDevice",
    "palyra.node.v1.FleetService/SetCertificatePolicy",
    "palyra.cluster.v1.ClusterService/MintJoinToken",
    "palyra.cluster.v1.ClusterService/TransferLeader",
    "palyra.cluster.v1.ClusterService/RemoveReplica",
    "palyra.cluster.v1.ClusterService/TriggerSnapshot",
    "palyra.worker.v1.WorkerService/SetPolicy",
    "palyra.ca.v1.CaService/RotateAuthority",
    "palyra.ca.v1.CaService/BeginRoot",
    "palyra.ca.v1.CaService/AdvanceRoot",
    "palyra.ca.v1.CaService/RevertRoot",
    "palyra.approval.v1.ApprovalService/SetPolicy",
];
/// Of gRPC itself.
const OTHERS: &[&str] = &[
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
];

fn methods() -> Vec<(&'static str, For)> {
    let groups = [
        (NODES, For::Nodes),
        (VIEWERS, For::Operators(Role::Viewer)),
        (OPERATORS, For::Operators(Role::Operator)),
        (ADMINS, For::Operators(Role::Admin)),
    ];
    let each = groups
        .into_iter()
        .flat_map(|(paths, who)| paths.iter().map(move |path| (*path, who)));
    each.collect()
}

/// The methods that the proto files declare, save those of the two other listeners.
fn declared() -> BTreeSet<String> {
    let folder = std::path::Path::new(".").join("../../proto");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let (mut package, mut service) = (String::new(), String::new());
        for line in text.lines().map(str::trim) {
            let word = |prefix: &str, end: char| {
                let rest = line.strip_prefix(prefix)?;
                Some(rest.split(end).next()?.trim().to_owned())
            };
            if let Some(name) = word("package ", ';') {
                package = name;
            } else if let Some(name) = word("service ", '{') {
                service = name;
            } else if let Some(name) = word("rpc ", '(')
                && !["EnrolService", "JoinService", "Peer"].contains(&service.as_str())
            {
                found.insert(format!("{package}.{service}/{name}"));
            }
        }
    }
    found
}

fn rng(out: &mut [u8]) {
    palyra_platform::fill_random(out);
}

fn csr() -> Vec<u8> {
    KeyPair::generate(&mut rng).unwrap().make_csr().unwrap()
}

fn recorded(issued: &IssuedCert, authority: u64) -> NewCertificate {
    NewCertificate {
        der: issued.der.clone().into(),
        spki: Fingerprint::from_bytes(issued.spki_sha256),
        serial: issued.serial.as_bytes()[..16].to_vec().into(),
        not_before: issued.not_before_ms,
        not_after: issued.not_after_ms,
        authority,
        authority_number: 0,
    }
}

/// The services over a cluster of one, and who calls them.
struct Fixture {
    control: Control,
    routes: Routes,
    admin: PeerIdentity,
    /// A node's certificate that the cluster's own authority signed, and that nobody recorded.
    unknown_node: PeerIdentity,
    _bus: Arc<Bus>,
}

impl Fixture {
    async fn new() -> Fixture {
        let cluster_id = Id::from_bytes(palyra_platform::new_ulid_bytes());
        let name = cluster_id.to_string();
        let domain = TrustDomain::for_cluster(&name).unwrap();
        let now = palyra_platform::wall_ms();
        let none = HostNames::default();
        let root = Root::create(&name, &domain, now, &mut rng).unwrap();
        let key = KeyPair::generate(&mut rng).unwrap();
        let signed = root
            .sign_authority(&key.make_csr().unwrap(), 1, now, &mut rng)
            .unwrap();
        let authority = Authority::new(signed.der.clone(), key).unwrap();
        let issue = |role, id: &str| {
            let id = SpiffeId::new(domain.clone(), role, id).unwrap();
            authority
                .issue_from_csr(&csr(), &id, 3_600_000, &none, now, &mut rng)
                .unwrap()
        };
        let operator = issue(CertificateRole::Operator, "root");
        let node = issue(CertificateRole::Node, "01JD7ZB2C4D6E8F0G1H3J5K7M9");
        let replica_id = SpiffeId::replica(domain.clone(), 1).unwrap();
        let replica = root
            .issue_from_csr(&csr(), &replica_id, 3_600_000, &none, now, &mut rng)
            .unwrap();
        let kek = Kek::generate(&mut rng);
        let sealed = kek
            .seal(Purpose::RootKey, name.as_bytes(), root.key().to_pkcs8(), &mut rng)
            .unwrap();
        let genesis = Genesis {
            cluster_id,
            trust_domain: domain.to_string(),
            root_cert_der: root.der().to_vec().into(),
            root_key_sealed: sealed.into(),
            replica_name: "r1".to_owned(),
            addresses: Addresses {
                peer: "127.0.0.1:7444".to_owned(),
                node: "127.0.0.1:7441".to_owned(),
                enrol: "127.0.0.1:7442".to_owned(),
                http: String::new(),
                metrics: "127.0.0.1:7445".to_owned(),
                quic: String::new(),
            },
            authority_cert_der: signed.der.into(),
            replica_certificate: recorded(&replica, 0),
            operator_name: "root".to_owned(),
            operator_certificate: recorded(&operator, 1),
        };
        let (admin, unknown_node) = (
            PeerIdentity::from_der(&operator.der).unwrap(),
            PeerIdentity::from_der(&node.der).unwrap(),
        );
        let bus = Bus::new();
        let keys = Keys { authority, kek };
        let control = start(&bus, cluster_id, domain, keys, genesis).await;
        let (routes, _) = Gateway::new(control.clone()).node_routes(1 << 20).unwrap();
        Fixture {
            control,
            routes,
            admin,
            unknown_node,
            _bus: bus,
        }
    }

    async fn operator(&self, name: &str, role: &str) -> PeerIdentity {
        let admin = self.control.admit_operator(&self.admin, Role::Admin).unwrap();
        let added = self
            .control
            .add_operator(&admin, "", name, role, &csr(), 0)
            .await
            .unwrap();
        PeerIdentity::from_der(&added.chain[0]).unwrap()
    }

    /// The code of the refusal that a call with an empty message gets; empty when it is answered or streams.
    async fn call(&self, path: &str, who: &PeerIdentity) -> String {
        let peer = Arc::new(Peer {
            identity: Some(who.clone()),
            source: "192.0.2.1:1".parse().unwrap(),
            id: 1,
            guard: OnceLock::from(1),
            end_point: None,
            cancel: tokio_util::sync::CancellationToken::new(),
        });
        let request = Request::post(format!("/{path}"))
            .header("content-type", "application/grpc")
            .extension(peer)
            .body(axum::body::Body::from(vec![0; 5]))
            .unwrap();
        let answer = self.routes.clone().oneshot(request);
        let answer = tokio::time::timeout(std::time::Duration::from_secs(20), answer);
        let answer = answer.await.unwrap().unwrap();
        let status = Status::from_header_map(answer.headers());
        let message = status
            .map(|status| status.message().to_owned())
            .unwrap_or_default();
        message.split(':').next().unwrap_or_default().to_owned()
    }
}

async fn start(bus: &Arc<Bus>, cluster_id: Id, domain: TrustDomain, keys: Keys, genesis: Genesis) -> Control {
    let engine = Arc::new(MemEngine::open(&Disk::new("r1")).unwrap());
    let replica = Replica::open(ReplicaConfig::new(1, cluster_id), engine, bus.transport(1))
        .await
        .unwrap();
    let config = ControlConfig {
        replica_id: 1,
        cluster_id,
        trust_domain: domain,
        version: "test".to_owned(),
        timings: Timings::default(),
        limits: Limits::default(),
    };
    let control = Control::start(config, replica.clone(), keys);
    bus.attach(1, replica.peer_service());
    replica.start();
    let id = Id::from_bytes(palyra_platform::new_ulid_bytes());
    found(&replica, Envelope::new(id, Actor::System, genesis))
        .await
        .unwrap();
    control
}

#[test]
fn every_declared_method_is_for_somebody() {
    let listed: BTreeSet<String> = methods().iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(listed, declared());
}

#[tokio::test]
async fn each_method_is_for_its_role_and_nobody_below() {
    let fixture = Fixture::new().await;
    let callers = [
        (fixture.operator("vera", "viewer").await, Role::Viewer),
        (fixture.operator("otto", "operator").await, Role::Operator),
        (fixture.admin.clone(), Role::Admin),
    ];
    for (path, who) in methods() {
        for (caller, role) in &callers {
            let code = fixture.call(path, caller).await;
            let refused = match who {
                For::Nodes => code == "E1001",
                For::Operators(needed) if *role < needed => code == "E0206",
                For::Operators(_) => {
                    let admitted = !matches!(code.as_str(), "E1001" | "E0206" | "E0303" | "E0304");
                    assert!(admitted, "{path} refuses {role:?} with {code}");
                    continue;
                }
            };
            assert!(refused, "{path} answers {role:?} with {code:?}");
        }
        let expected = if who == For::Nodes { "E0303" } else { "E1001" };
        let code = fixture.call(path, &fixture.unknown_node).await;
        assert_eq!(
            code, expected,
            "{path}, with a node's certificate that nobody recorded"
        );
    }
    for path in OTHERS {
        assert_eq!(fixture.call(path, &fixture.admin).await, "", "{path}");
        assert_eq!(fixture.call(path, &fixture.unknown_node).await, "E0303", "{path}");
    }
}

#[tokio::test]
async fn who_was_removed_is_refused_by_every_method() {
    let fixture = Fixture::new().await;
    let gone = fixture.operator("gone", "admin").await;
    let admin = fixture
        .control
        .admit_operator(&fixture.admin, Role::Admin)
        .unwrap();
    fixture
        .control
        .remove_operator(&admin, "", "gone", "left")
        .await
        .unwrap();
    let paths = methods().into_iter().map(|(path, _)| path);
    for path in paths.chain(OTHERS.iter().copied()) {
        let code = fixture.call(path, &gone).await;
        assert!(
            matches!(code.as_str(), "E0207" | "E0304" | "E1001"),
            "{path} answers {code:?}"
        );
    }
}

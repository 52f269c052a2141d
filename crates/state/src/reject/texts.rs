//! The list of codes with their texts; `{0}`, `{1}`.. are what the refusal names.

use super::Class;

/// What was refused. Codes are never renumbered or reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Code {
    /// This state holds no cluster yet.
    NoCluster = 101,
    /// The cluster … exists already.
    ClusterExists = 102,
    /// There is no replica ….
    NoSuchReplica = 103,
    /// Replica … was removed for good.
    ReplicaRemoved = 104,
    /// A replica named … exists already (id …).
    ReplicaNameTaken = 105,
    /// There is no join token ….
    NoSuchJoinToken = 106,
    /// Join token … was used already, by replica ….
    JoinTokenUsed = 107,
    /// Join token … expired at ….
    JoinTokenExpired = 108,
    /// Join token … is for a replica named …, not ….
    JoinTokenName = 109,
    /// Replica … is … and cannot become ….
    ReplicaStatusChange = 110,
    /// Replica … is the only voter.
    LastVoter = 111,
    /// The feature level is …, and cannot become ….
    FeatureLevel = 112,
    /// The limit of … replicas is reached.
    TooManyReplicas = 113,
    /// … join tokens are open.
    TooManyJoinTokens = 114,
    /// … needs the feature level …, and the cluster has ….
    FeatureMissing = 115,
    /// There is no operator ….
    NoSuchOperator = 201,
    /// An operator named … exists already.
    OperatorExists = 202,
    /// … is no name for an operator.
    BadOperatorName = 203,
    /// … is the last admin.
    LastAdmin = 204,
    /// The limit of … operators is reached.
    TooManyOperators = 205,
    /// … is …, and this needs ….
    RoleTooLow = 206,
    /// Operator … was removed.
    OperatorRemoved = 207,
    /// There is no device ….
    NoSuchDevice = 301,
    /// Device … was revoked.
    DeviceRevoked = 302,
    /// The certificate … was not issued by this cluster.
    CertificateUnknown = 303,
    /// The certificate … was revoked.
    CertificateRevoked = 304,
    /// The certificate … expired at ….
    CertificateExpired = 305,
    /// The certificate that the request brings cannot be recorded: ….
    BadCertificate = 306,
    /// The certificate … is recorded already.
    CertificateRecorded = 307,
    /// … has … certificates that are still valid.
    TooManyCertificates = 308,
    /// The public key of the request belongs to device ….
    KeyInUse = 309,
    /// … may not act for ….
    NotYours = 310,
    /// The limit of … devices is reached.
    TooManyDevices = 311,
    /// Device … was removed, and its id and keys stay refused.
    DeviceBanned = 320,
    /// … removed devices are remembered.
    TooManyBans = 321,
    /// Device … is trusted.
    DeviceTrusted = 322,
    /// Device … is …, not removed.
    DeviceNotRemoved = 323,
    /// A certificate of device … is valid until ….
    CertificatesValid = 324,
    /// There is no pairing code ….
    NoSuchCode = 401,
    /// Pairing code … was used already.
    CodeUsed = 402,
    /// Pairing code … is burned after … attempts.
    CodeBurned = 403,
    /// Pairing code … expired at ….
    CodeExpired = 404,
    /// Pairing code … was taken back.
    CodeRevoked = 405,
    /// No PIN is open.
    NoOpenCode = 406,
    /// … PINs are open, and the request names none.
    CodeAmbiguous = 407,
    /// Pairing code … is a …, not a ….
    CodeMethod = 408,
    /// Pairing is closed after … failed attempts; it reopens at ….
    PairingClosed = 409,
    /// … pairing codes are open.
    TooManyCodes = 410,
    /// A life of … ms is out of range.
    CodeTtl = 411,
    /// Pairing attempt … is not open.
    NoSuchAttempt = 412,
    /// There is no pairing request ….
    NoSuchPairing = 413,
    /// Pairing request … is ….
    PairingDecided = 414,
    /// Pairing request … expired at ….
    PairingExpired = 415,
    /// The digits do not match those of pairing request ….
    SasMismatch = 416,
    /// … pairing requests wait for an operator.
    TooManyPending = 417,
    /// Pairing code … is ….
    CodeClosed = 418,
    /// Node … has not registered.
    NodeNotRegistered = 501,
    /// The registration of node … is refused: ….
    BadRegistration = 502,
    /// The session of node … is refused: ….
    BadAttach = 503,
    /// Node … is gone since ….
    NodeGone = 504,
    /// There is no node ….
    NodeUnknown = 601,
    /// Node … has no capability ….
    NoSuchCapability = 602,
    /// … bytes are over the limit of ….
    PayloadTooLarge = 603,
    /// Node … has … dispatches that have not ended.
    QueueFull = 604,
    /// There is no dispatch ….
    NoSuchDispatch = 605,
    /// Dispatch … has its outcome already: ….
    ResultDuplicate = 606,
    /// The result of dispatch … came after its end: ….
    ResultLate = 607,
    /// Dispatch … belongs to another node.
    DispatchForeign = 608,
    /// Dispatch … is bound to session …, not ….
    EpochStale = 609,
    /// Dispatch … has ended: ….
    DispatchEnded = 610,
    /// A dispatch … exists already.
    DispatchExists = 611,
    /// A deadline of … ms is over the limit of ….
    BadDeadline = 612,
    /// Dispatches of … bytes wait in the cluster, and … is the limit.
    ClusterQueueFull = 613,
    /// For node … wait … dispatches while … are with it; its limit is ….
    DeviceQueueFull = 614,
    /// For capability … of node … wait … dispatches while … are with it; its limit is ….
    CapabilityQueueFull = 615,
    /// The result of dispatch … is of attempt …, and attempt … is under way.
    AttemptStale = 616,
    /// A rotation of the root is in phase …, begun by ….
    RotationUnderWay = 701,
    /// No rotation of the root is under way.
    NoRotation = 702,
    /// The rotation is in phase …, not ….
    RotationPhase = 703,
    /// Replicas … have not taken step ….
    ReplicasNotReady = 704,
    /// … nodes and … operators have not acknowledged generation ….
    NotAcknowledged = 705,
    /// The authority of replica … is refused: ….
    BadAuthority = 706,
    /// Replica … has no authority ….
    NoSuchAuthority = 707,
    /// Authority … of replica … is in use until ….
    AuthorityInUse = 708,
    /// The root is refused: ….
    BadRoot = 709,
    /// A list with number … is published already.
    StaleCrl = 710,
    /// The request id … is older than what is remembered.
    RequestTooOld = 901,
    /// The request id … is more than a day ahead of the cluster's clock.
    RequestAhead = 902,
    /// The request id … was used for ….
    RequestReused = 903,
    /// … may not ask for ….
    NotAllowed = 904,
    /// Replica … is no member.
    ReplicaUnknown = 905,
    /// … is refused: ….
    FieldInvalid = 906,
    /// … has … entries; the limit is ….
    TooMany = 907,
}

impl Code {
    /// All of them, in order.
    #[rustfmt::skip]
    pub const ALL: &'static [Code] = &[
        Code::NoCluster,
        Code::ClusterExists,
        Code::NoSuchReplica,
        Code::ReplicaRemoved,
        Code::ReplicaNameTaken,
        Code::NoSuchJoinToken,
        Code::JoinTokenUsed,
        Code::JoinTokenExpired,
        Code::JoinTokenName,
        Code::ReplicaStatusChange,
        Code::LastVoter,
        Code::FeatureLevel,
        Code::TooManyReplicas,
        Code::TooManyJoinTokens,
        Code::FeatureMissing,
        Code::NoSuchOperator,
        Code::OperatorExists,
        Code::BadOperatorName,
        Code::LastAdmin,
        Code::TooManyOperators,
        Code::RoleTooLow,
        Code::OperatorRemoved,
        Code::NoSuchDevice,
        Code::DeviceRevoked,
        Code::CertificateUnknown,
        Code::CertificateRevoked,
        Code::CertificateExpired,
        Code::BadCertificate,
        Code::CertificateRecorded,
        Code::TooManyCertificates,
        Code::KeyInUse,
        Code::NotYours,
        Code::TooManyDevices,
        Code::DeviceBanned,
        Code::TooManyBans,
        Code::DeviceTrusted,
        Code::DeviceNotRemoved,
        Code::CertificatesValid,
        Code::NoSuchCode,
        Code::CodeUsed,
        Code::CodeBurned,
        Code::CodeExpired,
        Code::CodeRevoked,
        Code::NoOpenCode,
        Code::CodeAmbiguous,
        Code::CodeMethod,
        Code::PairingClosed,
        Code::TooManyCodes,
        Code::CodeTtl,
        Code::NoSuchAttempt,
        Code::NoSuchPairing,
        Code::PairingDecided,
        Code::PairingExpired,
        Code::SasMismatch,
        Code::TooManyPending,
        Code::CodeClosed,
        Code::NodeNotRegistered,
        Code::BadRegistration,
        Code::BadAttach,
        Code::NodeGone,
        Code::NodeUnknown,
        Code::NoSuchCapability,
        Code::PayloadTooLarge,
        Code::QueueFull,
        Code::NoSuchDispatch,
        Code::ResultDuplicate,
        Code::ResultLate,
        Code::DispatchForeign,
        Code::EpochStale,
        Code::DispatchEnded,
        Code::DispatchExists,
        Code::BadDeadline,
        Code::ClusterQueueFull,
        Code::DeviceQueueFull,
        Code::CapabilityQueueFull,
        Code::AttemptStale,
        Code::RotationUnderWay,
        Code::NoRotation,
        Code::RotationPhase,
        Code::ReplicasNotReady,
        Code::NotAcknowledged,
        Code::BadAuthority,
        Code::NoSuchAuthority,
        Code::AuthorityInUse,
        Code::BadRoot,
        Code::StaleCrl,
        Code::RequestTooOld,
        Code::RequestAhead,
        Code::RequestReused,
        Code::NotAllowed,
        Code::ReplicaUnknown,
        Code::FieldInvalid,
        Code::TooMany,
    ];

    /// What kind of refusal it is.
    #[must_use]
    pub fn class(self) -> Class {
        self.text().0
    }

    /// How many arguments the texts take.
    pub(super) fn arguments(self) -> usize {
        let (_, message, next) = self.text();
        (0..10)
            .take_while(|at| {
                [message, next]
                    .iter()
                    .any(|text| text.contains(&format!("{{{at}}}")))
            })
            .count()
    }

    /// Class, message, and next step.
    pub(super) fn text(self) -> (Class, &'static str, &'static str) {
        match TEXTS.binary_search_by_key(&self, |row| row.0) {
            Ok(at) => (TEXTS[at].1, TEXTS[at].2, TEXTS[at].3),
            Err(_) => unreachable!("{self:?} has no text"),
        }
    }
}

/// Class, message and next step of every code, in the order of [`Code::ALL`].
#[rustfmt::skip]
const TEXTS: &[(Code, Class, &str, &str)] = &[
    (Code::NoCluster, Class::Precondition,
     "this state holds no cluster yet",
     "run `palyra cluster init` and start the first replica"),
    (Code::ClusterExists, Class::Conflict,
     "the cluster {0} exists already",
     "start the replica without `genesis.pb`, or use an empty data folder"),
    (Code::NoSuchReplica, Class::NotFound,
     "there is no replica {0}",
     "run `palyra cluster status` to see the replicas"),
    (Code::ReplicaRemoved, Class::Precondition,
     "replica {0} was removed for good",
     "mint a token with `palyra cluster join-token --name <name>` and join with an empty data folder"),
    (Code::ReplicaNameTaken, Class::Conflict,
     "a replica named {0} exists already (id {1})",
     "choose another name, or remove that replica first: `palyra cluster remove-replica {0}`"),
    (Code::NoSuchJoinToken, Class::NotFound,
     "there is no join token {0}",
     "mint one with `palyra cluster join-token --name <name>`"),
    (Code::JoinTokenUsed, Class::Conflict,
     "join token {0} was used already, by replica {1}",
     "mint another with `palyra cluster join-token --name <name>`"),
    (Code::JoinTokenExpired, Class::Expired,
     "join token {0} expired at {1}",
     "mint another with `palyra cluster join-token --name <name>`"),
    (Code::JoinTokenName, Class::Invalid,
     "join token {0} is for a replica named {1}, not {2}",
     "run `palyrad join --name {1}`, or mint a token for {2}"),
    (Code::ReplicaStatusChange, Class::Precondition,
     "replica {0} is {1} and cannot become {2}",
     "run `palyra cluster status` to see where it stands"),
    (Code::LastVoter, Class::Precondition,
     "replica {0} is the only voter",
     "join another replica first, and wait until `palyra cluster status` shows it as voter"),
    (Code::FeatureLevel, Class::Precondition,
     "the feature level is {0}, and cannot become {1}",
     "update every replica first; run `palyra cluster status`"),
    (Code::TooManyReplicas, Class::Exhausted,
     "the limit of {0} replicas is reached",
     "remove one first: `palyra cluster remove-replica <name>`"),
    (Code::TooManyJoinTokens, Class::Exhausted,
     "{0} join tokens are open",
     "use one of them, or wait until one expires"),
    (Code::FeatureMissing, Class::Precondition,
     "{0} needs the feature level {1}, and the cluster has {2}",
     "update every replica; the level rises by itself once all of them understand it"),
    (Code::NoSuchOperator, Class::NotFound,
     "there is no operator {0}",
     "run `palyra operator ls`"),
    (Code::OperatorExists, Class::Conflict,
     "an operator named {0} exists already",
     "choose another name, or remove that operator first: `palyra operator remove {0}`"),
    (Code::BadOperatorName, Class::Invalid,
     "{0} is no name for an operator",
     "use lower-case letters, digits, `.`, `_` and `-`, 63 at most, beginning with a letter or digit"),
    (Code::LastAdmin, Class::Precondition,
     "{0} is the last admin",
     "let another admin in first: `palyra operator add <name> --role admin`"),
    (Code::TooManyOperators, Class::Exhausted,
     "the limit of {0} operators is reached",
     "reuse a name that was removed"),
    (Code::RoleTooLow, Class::Denied,
     "{0} is {1}, and this needs {2}",
     "ask an admin to do it, or to raise your role"),
    (Code::OperatorRemoved, Class::Denied,
     "operator {0} was removed",
     "ask an admin for a new credential: `palyra operator add {0}`"),
    (Code::NoSuchDevice, Class::NotFound,
     "there is no device {0}",
     "run `palyra device ls`"),
    (Code::DeviceRevoked, Class::Denied,
     "device {0} was revoked",
     "pair the machine anew under another device id: `palyra pairing code`, then `palyra node pair` \
      there"),
    (Code::CertificateUnknown, Class::Denied,
     "the certificate {0} was not issued by this cluster",
     "pair the machine, or ask an admin for a credential"),
    (Code::CertificateRevoked, Class::Denied,
     "the certificate {0} was revoked",
     "get a new credential: pair the node anew, or ask an admin"),
    (Code::CertificateExpired, Class::Denied,
     "the certificate {0} expired at {1}",
     "renew it; a node that slept past its expiry must be paired anew"),
    (Code::BadCertificate, Class::Invalid,
     "the certificate that the request brings cannot be recorded: {0}",
     "send the request again; if it stays, look at the serving replica's log"),
    (Code::CertificateRecorded, Class::Conflict,
     "the certificate {0} is recorded already",
     "sign a new certificate and send the request again"),
    (Code::TooManyCertificates, Class::Exhausted,
     "{0} has {1} certificates that are still valid",
     "wait until one expires, or pair the device anew"),
    (Code::KeyInUse, Class::Conflict,
     "the public key of the request belongs to device {0}",
     "let the machine make a new key: remove the node's folder and pair again"),
    (Code::NotYours, Class::Denied,
     "{0} may not act for {1}",
     "use the credential of {1}"),
    (Code::TooManyDevices, Class::Exhausted,
     "the limit of {0} devices is reached",
     "start a second cluster"),
    (Code::DeviceBanned, Class::Denied, "device {0} was revoked and removed; its id and its keys stay refused",
     "wipe the machine's node folder and pair it as a new device; an admin can lift it: `palyra device purge {0}`"),
    (Code::TooManyBans, Class::Exhausted, "{0} removed devices are remembered, and no more fit",
     "purge some that are long gone: `palyra device ls --status removed`, then `palyra device purge DEVICE`"),
    (Code::DeviceTrusted, Class::Precondition, "device {0} is trusted",
     "revoke it first: `palyra device revoke {0}`, or both at once: `palyra device remove {0} --revoke`"),
    (Code::DeviceNotRemoved, Class::Precondition, "device {0} is {1}, not removed",
     "remove it first: `palyra device remove {0}`"),
    (Code::CertificatesValid, Class::Precondition, "a certificate of device {0} would be valid until {1}",
     "wait until then, or repeat with --force: it is refused all the same, but no CRL names it any more"),
    (Code::NoSuchCode, Class::NotFound,
     "there is no pairing code {0}",
     "mint one with `palyra pairing code`"),
    (Code::CodeUsed, Class::Conflict,
     "pairing code {0} was used already",
     "mint another with `palyra pairing code`"),
    (Code::CodeBurned, Class::Denied,
     "pairing code {0} is burned after {1} attempts",
     "mint another with `palyra pairing code`"),
    (Code::CodeExpired, Class::Expired,
     "pairing code {0} expired at {1}",
     "mint another with `palyra pairing code`"),
    (Code::CodeRevoked, Class::Denied,
     "pairing code {0} was taken back",
     "ask the operator for another: `palyra pairing code`"),
    (Code::NoOpenCode, Class::Precondition,
     "no PIN is open",
     "mint one with `palyra pairing code`"),
    (Code::CodeAmbiguous, Class::Invalid,
     "{0} PINs are open, and the request names none",
     "say which with `--code C<number>`"),
    (Code::CodeMethod, Class::Invalid,
     "pairing code {0} is a {1}, not a {2}",
     "use the matching command: `palyra node pair --pin` or `--ticket`"),
    (Code::PairingClosed, Class::Exhausted,
     "pairing is closed after {0} failed attempts; it reopens at {1}",
     "wait until then, and look at the sources in `palyra journal tail`"),
    (Code::TooManyCodes, Class::Exhausted,
     "{0} pairing codes are open",
     "take one back with `palyra pairing revoke <code>`, or wait until one expires"),
    (Code::CodeTtl, Class::Invalid,
     "a life of {0} ms is out of range",
     "ask for 30 s to 24 h"),
    (Code::NoSuchAttempt, Class::NotFound,
     "pairing attempt {0} is not open",
     "begin again: `palyra node pair`"),
    (Code::NoSuchPairing, Class::NotFound,
     "there is no pairing request {0}",
     "run `palyra pairing ls`"),
    (Code::PairingDecided, Class::Conflict,
     "pairing request {0} is {1}",
     "run `palyra pairing show {0}`"),
    (Code::PairingExpired, Class::Expired,
     "pairing request {0} expired at {1}",
     "mint a code with `palyra pairing code`, and pair the machine again"),
    (Code::SasMismatch, Class::Denied,
     "the digits do not match those of pairing request {0}",
     "compare both screens again; if they differ, reject with `palyra pairing reject {0}`"),
    (Code::TooManyPending, Class::Exhausted,
     "{0} pairing requests wait for an operator",
     "approve or reject some: `palyra pairing ls`"),
    (Code::CodeClosed, Class::Precondition,
     "pairing code {0} is {1}",
     "nothing is to be done; mint another with `palyra pairing code` if you need one"),
    (Code::NodeNotRegistered, Class::Precondition,
     "node {0} has not registered",
     "send Register first; `palyra node run` does"),
    (Code::BadRegistration, Class::Invalid,
     "the registration of node {0} is refused: {1}",
     "correct the node's configuration, then run `palyra node restart` there"),
    (Code::BadAttach, Class::Invalid,
     "the session of node {0} is refused: {1}",
     "restart the agent with a current version"),
    (Code::NodeGone, Class::Precondition,
     "node {0} is gone since {1}: it was offline for longer than it may be",
     "start its agent, it comes back by itself: `palyra node start` there; `palyra node describe {0}` \
      shows when it was last seen"),
    (Code::NodeUnknown, Class::NotFound,
     "there is no node {0}",
     "run `palyra node ls`"),
    (Code::NoSuchCapability, Class::NotFound,
     "node {0} has no capability {1}",
     "run `palyra node describe {0}`"),
    (Code::PayloadTooLarge, Class::Invalid,
     "{0} bytes are over the limit of {1}",
     "send less, or a reference to where the data lies"),
    (Code::QueueFull, Class::Exhausted,
     "node {0} has {1} dispatches that have not ended",
     "wait until some end, or cancel them: `palyra job ls`"),
    (Code::NoSuchDispatch, Class::NotFound,
     "there is no dispatch {0}",
     "run `palyra job ls`"),
    (Code::ResultDuplicate, Class::Conflict,
     "dispatch {0} has its outcome already: {1}",
     "forget the result"),
    (Code::ResultLate, Class::Expired,
     "the result of dispatch {0} came after its end: {1}",
     "forget the result"),
    (Code::DispatchForeign, Class::Denied,
     "dispatch {0} belongs to another node",
     "report results of your own dispatches only"),
    (Code::EpochStale, Class::Conflict,
     "dispatch {0} is bound to session {1}, not {2}",
     "attach again and list the dispatch as held"),
    (Code::DispatchEnded, Class::Conflict,
     "dispatch {0} has ended: {1}",
     "run `palyra job get {0}`"),
    (Code::DispatchExists, Class::Conflict,
     "a dispatch {0} exists already",
     "use a fresh id"),
    (Code::BadDeadline, Class::Invalid,
     "a deadline of {0} ms is over the limit of {1}",
     "ask for at most 24 h"),
    (Code::ClusterQueueFull, Class::Exhausted,
     "dispatches of {0} bytes wait in the cluster, and {1} is the limit",
     "wait until some dispatches end, or cancel them: `palyra job ls`"),
    (Code::DeviceQueueFull, Class::Exhausted,
     "for node {0} {1} dispatches wait while {2} are with it, and its limit is {3}",
     "send it again when some have ended (`palyra job ls --device {0}`), cancel some, or raise `queue_limit` in node.toml"),
    (Code::CapabilityQueueFull, Class::Exhausted,
     "for capability {0} of node {1} {2} dispatches wait while {3} are with it, and its limit is {4}",
     "send it again when some have ended (`palyra job ls --device {1}`), cancel some, or raise its `queue_limit` on the node"),
    (Code::AttemptStale, Class::Conflict,
     "the result of dispatch {0} is of attempt {1}, and attempt {2} is under way",
     "forget the result"),
    (Code::RotationUnderWay, Class::Conflict,
     "a rotation of the root is in phase {0}, begun by {1}",
     "see `palyra ca status`; finish it with `palyra ca rotate root advance`, or give it up with `palyra \
      ca rotate root revert`"),
    (Code::NoRotation, Class::Precondition,
     "no rotation of the root is under way",
     "begin one with `palyra ca rotate root begin`"),
    (Code::RotationPhase, Class::Conflict,
     "the rotation of the root is in phase {0}, not {1}",
     "somebody else moved it: look at `palyra ca status`, and decide again"),
    (Code::ReplicasNotReady, Class::Precondition,
     "replicas have not taken step {1} of the rotation yet: {0}",
     "wait until `palyra ca status` shows them ready; start those that are down, or remove them with \
      `palyra cluster remove-replica`; `--force --reason` leaves them behind"),
    (Code::NotAcknowledged, Class::Precondition,
     "{0} nodes and {1} operators have not acknowledged generation {2} of the trust bundle",
     "`palyra ca status --all` names them; bring them online, or leave them behind with `--force \
      --reason`: nodes pair again then, and operators need a new credential"),
    (Code::BadAuthority, Class::Precondition,
     "the new authority of replica {0} is refused: {1}",
     "the replica tries again by itself; look at `palyra ca status`"),
    (Code::NoSuchAuthority, Class::NotFound,
     "replica {0} has no authority {1}",
     "look at `palyra ca status`"),
    (Code::AuthorityInUse, Class::Precondition,
     "authority {1} of replica {0} is in use; its last certificate ends at {2}",
     "it is forgotten by itself once it issues no more and its last certificate has expired"),
    (Code::BadRoot, Class::Invalid,
     "the root is refused: {0}",
     "make a new one: `palyra ca rotate root begin` without a file"),
    (Code::StaleCrl, Class::Conflict,
     "a list of revoked certificates with number {0} is published already; this one has {1}",
     "nothing needs to be done: the newer list stands"),
    (Code::RequestTooOld, Class::Expired,
     "the request id {0} is older than what is remembered",
     "if you do not know what became of it, look before you send it again under a new id"),
    (Code::RequestAhead, Class::Invalid,
     "the request id {0} is more than a day ahead of the cluster's clock",
     "set the machine's clock and send it again under a new id"),
    (Code::RequestReused, Class::Conflict,
     "the request id {0} was used for {1}",
     "send this one under a fresh id"),
    (Code::NotAllowed, Class::Denied,
     "{0} may not ask for {1}",
     "use a credential that may: `palyra context` shows yours"),
    (Code::ReplicaUnknown, Class::Denied,
     "replica {0} is no member",
     "run `palyra cluster status`"),
    (Code::FieldInvalid, Class::Invalid,
     "{0} is refused: {1}",
     "correct the request"),
    (Code::TooMany, Class::Invalid,
     "{0} has {1} entries; the limit is {2}",
     "send fewer in one request"),
];

// Every code has its text, in order, so that the search above finds it.
const _: () = {
    assert!(TEXTS.len() == Code::ALL.len());
    let mut at = 0;
    while at < TEXTS.len() {
        assert!(TEXTS[at].0 as i32 == Code::ALL[at] as i32);
        assert!(at == 0 || (TEXTS[at - 1].0 as i32) < TEXTS[at].0 as i32);
        at += 1;
    }
};

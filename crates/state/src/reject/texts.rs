//! The list of codes with their texts; `{0}`, `{1}`.. are what the refusal names.

use super::Class;
use super::words::TEXTS;

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
    /// The certificate … works no more: a newer one of … is in use.
    CertificateSuperseded = 312,
    /// The renewal of device … carries no counter.
    NoCounter = 313,
    /// Device … is suspected to be two machines: ….
    CloneSuspected = 314,
    /// Device … cannot recover: ….
    RecoveryClosed = 315,
    /// The proof of device … does not hold: ….
    RecoveryProof = 316,
    /// Device … is not suspected of anything.
    NoSuspicion = 317,
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
    /// There is no worker ….
    NoSuchWorker = 801,
    /// Worker … has no open challenge.
    NoChallenge = 802,
    /// Worker … is quarantined: ….
    WorkerQuarantined = 803,
    /// Worker … is one too many: there are …, and the limit is ….
    TooManyWorkers = 804,
    /// Session … of worker … is not its present one.
    WorkerSession = 805,
    /// The fleet's policy has version …, not ….
    PolicyConflict = 806,
    /// The fleet's policy is refused: ….
    BadPolicy = 807,
    /// Worker … is not draining.
    NotDraining = 808,
    /// Worker … has nothing to clean.
    NothingToClean = 809,
    /// Fence … of lease … is not live on worker ….
    ViolationStale = 810,
    /// The device of worker … was revoked.
    WorkerBarred = 811,
    /// No policy admits worker …: none is set.
    NoPolicy = 812,
    /// The policy allows no … at all, so worker … is not admitted.
    NoExpectation = 813,
    /// The statement of worker … cannot be read: ….
    StatementMalformed = 814,
    /// The statement of worker … has … bytes; the limit is ….
    StatementTooLarge = 815,
    /// The statement of worker … is for another cluster.
    ForeignCluster = 816,
    /// The statement that worker … shows is of ….
    ForeignWorker = 817,
    /// The statement of worker … is not over the nonce of its challenge.
    NonceMismatch = 818,
    /// The statement of worker … is over a nonce that was used.
    StatementReplayed = 819,
    /// The challenge of worker … ended at ….
    ChallengeExpired = 820,
    /// The challenge of worker … was opened in session …, not ….
    ChallengeSession = 821,
    /// The key … that signed the statement of worker … is not of a certificate of it that is in use.
    SignerUnknown = 822,
    /// The signature of the statement of worker … does not hold.
    StatementForged = 823,
    /// The statement of worker … ended at ….
    StatementExpired = 824,
    /// The statement of worker … was made … ms in the future.
    StatementFuture = 825,
    /// The statement of worker … is good for … ms; the policy allows ….
    StatementLife = 826,
    /// Worker … speaks version … of the SDK's protocol; the policy allows … to ….
    SdkProtocol = 827,
    /// Worker … has WIT ABI …, which the policy does not allow.
    WitAbi = 828,
    /// Worker … claims … slots; there may be 1 to ….
    SlotsClaimed = 829,
    /// Worker … runs image …, which the policy does not allow.
    ImageNotAllowed = 830,
    /// Worker … is build …, which the policy does not allow.
    BuildNotAllowed = 831,
    /// Worker … offers tools …, which the policy does not allow.
    ArtifactNotAllowed = 832,
    /// The digests of worker … are by supervisor …, which the policy does not allow.
    SupervisorNotAllowed = 833,
    /// Worker … claims the evidence …: ….
    EvidenceUnproven = 834,
    /// Worker … claims hardware evidence and shows no quote.
    QuoteMissing = 835,
    /// The quote of worker … is by …, whom the policy does not name.
    QuoteProvider = 836,
    /// The signature of the quote of worker … does not hold.
    QuoteForged = 837,
    /// The quote of worker … vouches for another ….
    QuoteForeign = 838,
    /// Worker … shows no egress binding, and the policy requires ….
    EgressMissing = 839,
    /// The egress binding of worker … is by proxy …, which the policy does not name.
    EgressUnknown = 840,
    /// The egress binding of worker … is by proxy …; the policy requires ….
    EgressOther = 841,
    /// The signature of the egress binding of worker … does not hold.
    EgressForged = 842,
    /// The egress binding of worker … ended at ….
    EgressExpired = 843,
    /// The egress binding of worker … is good from … on.
    EgressEarly = 844,
    /// The egress binding that worker … shows is of ….
    EgressForeign = 845,
    /// The list of tools of worker … is refused: ….
    CapabilityList = 846,
    /// Worker … offers tool …, which the policy does not trust.
    CapabilityUntrusted = 847,
    /// The tool … of worker … is vouched for by …, whom the policy does not trust for it.
    AuthorityUntrusted = 848,
    /// The tool … wants the evidence …, and worker … proves ….
    EvidenceTooLow = 849,
    /// There is no run ….
    NoSuchRun = 850,
    /// A run … exists already.
    RunExists = 851,
    /// Run … has ended: ….
    RunEnded = 852,
    /// The list of … files is refused: ….
    BadManifest = 853,
    /// The scope is refused: ….
    BadScope = 854,
    /// Run … has no file ….
    NoSuchFile = 855,
    /// The next piece of file … begins at …, not ….
    PieceOrder = 856,
    /// File … has the digest …: it was dropped.
    FileDigest = 857,
    /// Files of … bytes are kept for runs that have not ended, and … is the limit.
    FilesFull = 858,
    /// There is no lease ….
    NoSuchLease = 859,
    /// The fence of … is …, and the message carries ….
    FenceStale = 860,
    /// Lease … is …: ….
    LeaseOver = 861,
    /// … is bound to session …, not ….
    SessionStale = 862,
    /// Lease … belongs to another worker.
    LeaseForeign = 863,
    /// Output … of run … has not arrived.
    OutputMissing = 864,
    /// … runs have not ended, and … is the limit.
    TooManyRuns = 865,
    /// Runs of … bytes have not ended, and … is the limit.
    RunsFull = 866,
    /// A … of … ms is out of range.
    BadRunTime = 867,
    /// Run … is …: it takes no input.
    RunTakesNoInput = 868,
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
    /// There is no approval ….
    NoSuchApproval = 910,
    /// Approval … is ….
    ApprovalDecided = 911,
    /// Approval … expired at ….
    ApprovalExpired = 912,
    /// … asked for approval …, and nobody allows what they asked for.
    FourEyes = 913,
    /// Approval … is of a pairing request, which its own commands decide.
    ApprovalOfPairing = 914,
    /// A decision for … ms is over the limit of ….
    DecisionTtl = 915,
    /// … approvals … already.
    TooManyApprovals = 916,
    /// … has … … already.
    TooManyGrants = 917,
    /// There is no grant ….
    NoSuchGrant = 918,
    /// There is no grant for run ….
    NoGrant = 919,
    /// Grant … waits for approval ….
    GrantPending = 920,
    /// Grant … was denied by …: ….
    GrantDenied = 921,
    /// Grant … expired at ….
    GrantExpired = 922,
    /// Grant … was used already, for run ….
    GrantUsed = 923,
    /// Grant … was revoked by …: ….
    GrantRevoked = 924,
    /// Grant … is for tool …, not ….
    GrantTool = 925,
    /// Grant … was given to …, not to ….
    GrantForeign = 926,
    /// Run … has grant … already, which is ….
    RunHasGrant = 927,
    /// A grant for … ms is over the limit of ….
    GrantTtl = 928,
    /// Grant … rests on a decision of …, who may not decide any more.
    DecisionVoid = 929,
}

impl Code {
    /// All of them, in order.
    pub const ALL: &'static [Code] = &{
        let mut all = [Code::NoCluster; TEXTS.len()];
        let mut at = 0;
        while at < all.len() {
            all[at] = TEXTS[at].0;
            at += 1;
        }
        all
    };

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

// Texts are in order, so that the search above finds them; that every code has one is a test's.
const _: () = {
    let mut at = 1;
    while at < TEXTS.len() {
        assert!((TEXTS[at - 1].0 as i32) < TEXTS[at].0 as i32);
        at += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_text() {
        let codes: Vec<Code> = (0..10_000)
            .filter_map(|number| Code::try_from(number).ok())
            .collect();
        assert_eq!(codes, Code::ALL);
    }
}

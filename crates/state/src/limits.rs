//! Every bound of the state in one place, with the relations that must hold between them checked at compile
//! time.
//!
//! Times are milliseconds, sizes bytes, unless a name says otherwise. A limit is part of the state machine:
//! replicas that disagree on one diverge, so a change needs a new feature level.

/// One second in milliseconds.
pub const SECOND: u64 = 1_000;
/// One minute in milliseconds.
pub const MINUTE: u64 = 60 * SECOND;
/// One hour in milliseconds.
pub const HOUR: u64 = 60 * MINUTE;
/// One day in milliseconds.
pub const DAY: u64 = 24 * HOUR;

/// The feature level that this binary understands; a cluster of a higher one must not be served by it.
pub const FEATURE_LEVEL: u32 = 2;
/// The level at which every cluster is born, whatever binary applies its first entry. Level 1 was never released: its
/// rules are gone, and a cluster of it must not be served either.
pub const FIRST_FEATURE_LEVEL: u32 = 2;

/// Largest encoded envelope.
pub const ENVELOPE_MAX: usize = 1024 * 1024;

/// How long a request id is remembered.
pub const DEDUP_WINDOW: u64 = HOUR;
/// How many requests are remembered in all.
pub const DEDUP_MAX: u64 = 65_536;
/// How many requests of one actor are remembered.
pub const DEDUP_PER_ACTOR: u64 = 16_384;
/// How many remembered requests one entry may forget.
pub const DEDUP_EVICT: usize = 4;
/// How far the time in a request id may be ahead of the state's clock.
pub const REQUEST_AHEAD_MAX: u64 = DAY;

/// How many journal rows are kept.
pub const JOURNAL_ROWS: u64 = 200_000;
/// How many rows more than it adds one entry may trim.
pub const JOURNAL_TRIM: u64 = 8;
/// How many details a row may have.
pub const DETAILS: usize = 16;
/// Longest actor, subject, or value of a detail of a row; longer ones are cut.
pub const DETAIL_VALUE: usize = 512;
/// Longest argument of a refusal; longer ones are cut.
pub const REJECT_ARG: usize = 256;

/// Longest name of a node, device, label or platform.
pub const NAME_MAX: usize = 128;
/// Longest name of an operator, a replica or a capability.
pub const SHORT_NAME_MAX: usize = 63;
/// Longest reason, address or error code.
pub const REASON_MAX: usize = 512;
/// Longest error message of a node.
pub const ERROR_MESSAGE_MAX: usize = 4_096;
/// Largest certificate or CSR.
pub const CERTIFICATE_MAX: usize = 16 * 1024;
/// Largest sealed blob.
pub const SEALED_MAX: usize = 8 * 1024;

/// Replicas that are not removed.
pub const REPLICAS: usize = 32;
/// Replicas that ever were.
pub const REPLICAS_EVER: u64 = 1_024;
/// Join tokens kept, used and expired ones included.
pub const JOIN_TOKENS: usize = 32;
/// Life of a join token when none is asked for.
pub const JOIN_TOKEN_TTL: u64 = HOUR;
/// Longest life of a join token.
pub const JOIN_TOKEN_TTL_MAX: u64 = DAY;
/// Shortest life of a join token.
pub const JOIN_TOKEN_TTL_MIN: u64 = 30 * SECOND;

/// Operators, removed ones included.
pub const OPERATORS: usize = 1_000;
/// Certificates kept for one device or operator.
pub const CERTIFICATES: usize = 8;
/// Devices, revoked ones included.
pub const DEVICES: u64 = 100_000;
/// Removed devices whose id and keys stay refused. None is ever pushed out: a full table refuses another.
pub const BANS: u64 = 100_000;
/// Removed devices whose expired certificates one removal forgets.
pub const BANS_SWEPT: usize = 4;
/// How long after the end of its certificate a device may recover, unless the cluster's policy says otherwise.
pub const RECOVERY_WINDOW: u64 = 30 * DAY;
/// The longest that the policy may say.
pub const RECOVERY_WINDOW_MAX: u64 = 366 * DAY;
/// Within which time a rotation should be in use when nothing is asked for.
pub const ROTATION_DEADLINE: u64 = DAY;
/// Shortest such time.
pub const ROTATION_DEADLINE_MIN: u64 = SECOND;
/// Longest such time.
pub const ROTATION_DEADLINE_MAX: u64 = 30 * DAY;

/// Codes that are open at one time.
pub const CODES_OPEN: usize = 20;
/// Codes kept, closed ones included.
pub const CODES: u64 = 512;
/// Shortest life of a code.
pub const CODE_TTL_MIN: u64 = 30 * SECOND;
/// Life of a code when none is asked for.
pub const CODE_TTL: u64 = 10 * MINUTE;
/// Longest life of a code.
pub const CODE_TTL_MAX: u64 = DAY;
/// Attempts that burn a code.
pub const ATTEMPTS: u32 = 5;
/// How long an attempt may be proved after it began.
pub const ATTEMPT_TTL: u64 = 2 * MINUTE;
/// Attempts without a right proof, within [`FAILURE_WINDOW`], that close pairing.
pub const FAILURES: usize = 20;
/// The window in which failures are counted.
pub const FAILURE_WINDOW: u64 = 10 * MINUTE;
/// Pairing requests that wait for an operator.
pub const REQUESTS_PENDING: u64 = 256;
/// Pairing requests kept, decided ones included.
pub const REQUESTS: u64 = 2_048;
/// How long a pairing request waits for an operator.
pub const REQUEST_TTL: u64 = DAY;

/// Capabilities of a node.
pub const CAPABILITIES: usize = 64;
/// Labels of a node.
pub const LABELS: usize = 32;
/// Longest description of a capability.
pub const DESCRIPTION_MAX: usize = 256;
/// Sessions that one entry may detach.
pub const DETACH_BATCH: usize = 256;
/// Nodes that one entry may move to their next status.
pub const LAPSE_BATCH: usize = 256;
/// How long a node whose session ended may take to come back before it is offline, when nothing else is asked for:
/// a lost session is noticed by the node within 7 s, and a pause before a new one is at most 5 s.
pub const SUSPECT_FOR: u64 = 15 * SECOND;
/// How long a node may be offline before it is gone, when nothing else is asked for.
pub const LOST_AFTER: u64 = DAY;
/// Shortest time that a node may ask for.
pub const LOST_AFTER_MIN: u64 = SECOND;
/// Longest time that a node may ask for, save [`NEVER`].
pub const LOST_AFTER_MAX: u64 = 366 * DAY;
/// Asks for no end of a time.
pub const NEVER: u64 = u64::MAX;

/// Largest payload or result of a dispatch.
pub const PAYLOAD: usize = 512 * 1024;
/// Dispatches of one device that have not ended.
pub const OPEN_PER_DEVICE: u32 = 1_024;
/// Dispatches that are with one device at a time, whatever it declares: what an attach may have to move.
pub const BOUND_PER_DEVICE: u32 = 256;
/// How far a class of priority goes before the one below it: a dispatch passes what is at most so much older.
pub const PRIORITY_LEAD: u64 = 5 * MINUTE;
/// Deliveries of one dispatch.
pub const DELIVERIES: u32 = 100;
/// Earlier attempts that a dispatch remembers.
pub const ATTEMPTS_KEPT: usize = 16;
/// Longest message of an earlier attempt; longer ones are cut.
pub const ATTEMPT_MESSAGE: usize = 256;
/// Longest wait before the next attempt.
pub const BACKOFF_MAX: u64 = HOUR;
/// Reasons that a capability may name for another attempt.
pub const RETRY_ON: usize = 16;
/// Last lines of a program that are kept with the result, in bytes.
pub const LOG_TAIL: usize = 4_096;
/// How long a node may take to say what became of a dispatch that was taken back.
pub const CANCEL_PATIENCE: u64 = MINUTE;
/// Bytes of all dispatches that have not ended: their payloads, and [`DISPATCH_COST`] for each.
pub const OPEN_BYTES: u64 = 512 * 1024 * 1024;
/// What a dispatch counts beside its payload, so that empty ones are bounded too.
pub const DISPATCH_COST: u64 = 1024;
/// Ended dispatches kept.
pub const FINISHED: u64 = 10_000;
/// Payload and result bytes of ended dispatches kept.
pub const FINISHED_BYTES: u64 = 256 * 1024 * 1024;
/// Deadline of a dispatch when none is asked for.
pub const DEADLINE: u64 = 30 * SECOND;
/// Longest deadline of a dispatch.
pub const DEADLINE_MAX: u64 = DAY;
/// Ids that one `Expire` may name.
pub const EXPIRE_BATCH: usize = 256;

/// Roots kept, retired ones included.
pub const ROOTS: usize = 8;
/// Authorities of one replica that are kept: the active one, and those whose certificates are good still.
pub const AUTHORITIES: usize = 8;
/// Devices, or operators, of which one entry may say that they hold a bundle.
pub const ACK_BATCH: usize = 256;
/// Certificates that one list of revoked ones holds; of more, those that end last.
pub const CRL_ENTRIES: usize = 8_192;
/// Largest signed list of revoked certificates: that many entries of 48 bytes, and what stands around them.
pub const CRL_MAX: usize = 512 * 1024;

/// Workers, whatever the policy says.
pub const WORKERS: u64 = 10_000;
/// Slots of one worker, whatever the policy says.
pub const SLOTS_PER_WORKER: u32 = 64;
/// How long a challenge is open.
pub const CHALLENGE_TTL: u64 = 2 * MINUTE;
/// How far ahead of the state's clock a statement, a binding or a quote may have been made.
pub const ISSUED_AHEAD: u64 = 30 * SECOND;
/// Longest life of a statement when the policy says nothing.
pub const ATTESTATION_LIFE: u64 = DAY;
/// The longest that the policy may say.
pub const ATTESTATION_LIFE_MAX: u64 = 30 * DAY;
/// Largest statement.
pub const STATEMENT_MAX: usize = 32 * 1024;
/// Largest public key or signature.
pub const KEY_MAX: usize = 256;
/// Digests of one kind, keys, or tools that the policy names.
pub const POLICY_ENTRIES: usize = 256;
/// Authorities of one tool.
pub const AUTHORITIES_PER_TOOL: usize = 16;
/// How long a worker's session may be away when the policy says nothing.
pub const HEARTBEAT_TIMEOUT: u64 = 15 * SECOND;
/// Shortest and longest that the policy may say.
pub const HEARTBEAT_TIMEOUT_MIN: u64 = SECOND;
/// See [`HEARTBEAT_TIMEOUT_MIN`].
pub const HEARTBEAT_TIMEOUT_MAX: u64 = DAY;
/// How long a drain lets what runs go on when nothing is asked for.
pub const DRAIN: u64 = HOUR;
/// Longest drain.
pub const DRAIN_MAX: u64 = 7 * DAY;
/// How long a worker must have been away before it may be forgotten, when nothing is asked for.
pub const REAP_AFTER: u64 = DAY;
/// Statements that one entry checks again: each may take two signatures, of a quarter of a millisecond each.
pub const RECHECK_BATCH: usize = 64;
/// Leases of which no cleanup was reported that one worker remembers; with more it is failed.
pub const UNCLEAN: usize = 128;

/// Time between two renewals that a lease survives when nothing is asked for.
pub const LEASE_TTL: u64 = 30 * SECOND;
/// The shortest.
pub const LEASE_TTL_MIN: u64 = SECOND;
/// The longest, whatever the policy says.
pub const LEASE_TTL_MAX: u64 = HOUR;
/// Renewals of one entry.
pub const RENEW_BATCH: usize = 1_024;
/// Leases that a worker may have something of.
pub const LEASES_HELD: usize = 256;
/// Deadline of a run when none is asked for.
pub const RUN_TIMEOUT: u64 = 10 * MINUTE;
/// The longest.
pub const RUN_TIMEOUT_MAX: u64 = 7 * DAY;
/// Attempts of an idempotent run when nothing is asked for.
pub const RUN_ATTEMPTS: u32 = 3;
/// The most.
pub const RUN_ATTEMPTS_MAX: u32 = 16;
/// Largest parameters of a run.
pub const RUN_PARAMS: usize = 256 * 1024;
/// Largest result of a run.
pub const RUN_RESULT: usize = 256 * 1024;
/// Files of a manifest.
pub const MANIFEST: usize = 64;
/// Longest path of a manifest or scope.
pub const PATH_MAX: usize = 255;
/// Paths of a scope, of each kind.
pub const SCOPE_PATHS: usize = 32;
/// Pieces that files arrive in; the last one is less.
pub const ARTIFACT_CHUNK: usize = 256 * 1024;
/// Largest file that is kept with a run.
pub const ARTIFACT_MAX: u64 = 4 * 1024 * 1024;
/// Bytes of all inputs, and of all outputs, of a run that are kept.
pub const ARTIFACTS_OF_RUN: u64 = 8 * 1024 * 1024;
/// Bytes of all files that are kept; ended runs are forgotten to make room.
pub const ARTIFACT_BYTES: u64 = 256 * 1024 * 1024;
/// Runs that have not ended.
pub const RUNS_OPEN: u64 = 50_000;
/// Ended runs kept.
pub const RUNS_ENDED: u64 = 10_000;
/// Bytes of runs that have not ended, beside their files.
pub const RUNS_OPEN_BYTES: u64 = 512 * 1024 * 1024;
/// Bytes of ended runs kept, beside their files.
pub const RUNS_ENDED_BYTES: u64 = 256 * 1024 * 1024;
/// Bytes of files of runs that have not ended which inputs may fill; the rest is for outputs, or no run could end.
pub const INPUT_BYTES: u64 = ARTIFACT_BYTES / 2;
/// Candidates that one search for a worker, or for a run, looks at.
pub const SELECTION: usize = 64;
/// Candidates that a search for the worker of a run with labels looks at: most may have others.
pub const SELECTION_LABELS: usize = 1_024;
/// Figures that a worker reports of what a run used, and words on what held it.
pub const RUN_USAGE: usize = 16;

/// Approvals that wait, beside those of pairings.
pub const APPROVALS_PENDING: u64 = 4_096;
/// Approvals, and grants, that are kept, decided ones included.
pub const APPROVALS: u64 = 16_384;
/// How many of them one entry may forget.
pub const APPROVALS_FORGET: usize = 4;
/// Grants of one operator that are pending or active: what the entry that removes the operator takes back.
pub const GRANTS_LIVE: usize = 1_024;
/// Decisions that stand for one operator; the same.
pub const STANDING: usize = 64;
/// How long an approval of a grant waits when the policy says nothing.
pub const APPROVAL_TIMEOUT: u64 = HOUR;
/// How long a grant may be used when nothing is asked for.
pub const GRANT_TTL: u64 = HOUR;
/// The longest, for grants and for decisions that cover more.
pub const GRANT_TTL_MAX: u64 = 7 * DAY;
/// The shortest time that the policy may let approvals wait.
pub const APPROVAL_TIMEOUT_MIN: u64 = SECOND;
/// How long a decision that covers more is good when nothing is asked for.
pub const TIMEBOX: u64 = HOUR;
/// The longest when the policy says nothing.
pub const TIMEBOX_MAX: u64 = DAY;
/// Longest summary of a prompt.
pub const SUMMARY_MAX: usize = 2_048;

/// Entries of a page when none is asked for.
pub const PAGE: usize = 500;
/// Most entries of a page.
pub const PAGE_MAX: usize = 1_000;

const _: () = {
    assert!(FIRST_FEATURE_LEVEL <= FEATURE_LEVEL);
    // A retry must find its answer for longer than any wait that can be asked for.
    assert!(DEDUP_WINDOW >= 2 * FAILURE_WINDOW);
    assert!(DEDUP_PER_ACTOR < DEDUP_MAX);
    // Forgetting must outrun remembering, or a table grows without bound.
    assert!(DEDUP_EVICT > 1);
    assert!(CODE_TTL_MIN < CODE_TTL && CODE_TTL < CODE_TTL_MAX);
    assert!(JOIN_TOKEN_TTL_MIN < JOIN_TOKEN_TTL && JOIN_TOKEN_TTL < JOIN_TOKEN_TTL_MAX);
    // Forgetting must outrun removing.
    assert!(BANS_SWEPT > 1);
    assert!((ATTEMPTS as usize) < FAILURES);
    assert!(ATTEMPT_TTL < FAILURE_WINDOW);
    assert!((CODES_OPEN as u64) < CODES);
    assert!(REQUESTS_PENDING < REQUESTS);
    // Forgetting must outrun asking, and what waits must leave room for what was decided.
    assert!(APPROVALS_FORGET > 1 && APPROVALS_PENDING + REQUESTS_PENDING < APPROVALS);
    assert!(APPROVAL_TIMEOUT_MIN < APPROVAL_TIMEOUT && APPROVAL_TIMEOUT <= GRANT_TTL_MAX);
    assert!(TIMEBOX < TIMEBOX_MAX && TIMEBOX_MAX <= GRANT_TTL_MAX);
    // A payload with everything around it must fit one entry, and a full node list one message.
    assert!(PAYLOAD + LOG_TAIL + 64 * 1024 <= ENVELOPE_MAX);
    assert!(BOUND_PER_DEVICE <= OPEN_PER_DEVICE);
    assert!(CANCEL_PATIENCE < DEADLINE_MAX && BACKOFF_MAX < DEADLINE_MAX);
    assert!(DEADLINE < DEADLINE_MAX);
    assert!(SUSPECT_FOR < LOST_AFTER);
    assert!(LOST_AFTER_MIN < LOST_AFTER && LOST_AFTER < LOST_AFTER_MAX && LOST_AFTER_MAX < NEVER);
    assert!(PAGE < PAGE_MAX);
    assert!(LEASE_TTL_MIN < LEASE_TTL && LEASE_TTL < LEASE_TTL_MAX && LEASE_TTL_MAX <= RUN_TIMEOUT_MAX);
    assert!(HEARTBEAT_TIMEOUT_MIN < HEARTBEAT_TIMEOUT && HEARTBEAT_TIMEOUT < HEARTBEAT_TIMEOUT_MAX);
    assert!(ATTESTATION_LIFE < ATTESTATION_LIFE_MAX);
    assert!(ARTIFACT_MAX <= ARTIFACTS_OF_RUN && ARTIFACTS_OF_RUN <= INPUT_BYTES);
    assert!(ARTIFACT_CHUNK + 64 * 1024 <= ENVELOPE_MAX && SELECTION < SELECTION_LABELS);
    assert!(RUN_ATTEMPTS <= RUN_ATTEMPTS_MAX && LEASE_TTL_MAX <= RUN_TIMEOUT_MAX);
    assert!(
        RUN_PARAMS + 64 * PATH_MAX * 4 <= ENVELOPE_MAX && RUN_RESULT + LOG_TAIL + 128 * 1024 <= ENVELOPE_MAX
    );
    assert!((SLOTS_PER_WORKER as usize) < LEASES_HELD);
    assert!(CRL_MAX + 1024 <= ENVELOPE_MAX && CRL_ENTRIES * 48 < CRL_MAX);
    // Both roots of a rotation, and one that is retired to make room.
    assert!(ROOTS > 2);
    assert!(RECOVERY_WINDOW < RECOVERY_WINDOW_MAX);
    assert!(ROTATION_DEADLINE_MIN < ROTATION_DEADLINE && ROTATION_DEADLINE < ROTATION_DEADLINE_MAX);
    assert!((OPEN_PER_DEVICE as usize) * 16 <= ENVELOPE_MAX);
};

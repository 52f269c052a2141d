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
    // A payload with everything around it must fit one entry, and a full node list one message.
    assert!(PAYLOAD + LOG_TAIL + 64 * 1024 <= ENVELOPE_MAX);
    assert!(BOUND_PER_DEVICE <= OPEN_PER_DEVICE);
    assert!(CANCEL_PATIENCE < DEADLINE_MAX && BACKOFF_MAX < DEADLINE_MAX);
    assert!(DEADLINE < DEADLINE_MAX);
    assert!(SUSPECT_FOR < LOST_AFTER);
    assert!(LOST_AFTER_MIN < LOST_AFTER && LOST_AFTER < LOST_AFTER_MAX && LOST_AFTER_MAX < NEVER);
    assert!(PAGE < PAGE_MAX);
    assert!(CRL_MAX + 1024 <= ENVELOPE_MAX && CRL_ENTRIES * 48 < CRL_MAX);
    // Both roots of a rotation, and one that is retired to make room.
    assert!(ROOTS > 2);
    assert!(RECOVERY_WINDOW < RECOVERY_WINDOW_MAX);
    assert!(ROTATION_DEADLINE_MIN < ROTATION_DEADLINE && ROTATION_DEADLINE < ROTATION_DEADLINE_MAX);
    assert!((OPEN_PER_DEVICE as usize) * 16 <= ENVELOPE_MAX);
};

//! The text forms of pairing tickets and join tokens: what an operator pastes or scans.
//!
//! What never lives here: the decision whether a ticket is still good; only the cluster knows.
//!
//! Form: `palyra-ticket.` or `palyra-join.`, then base64url without padding of: one byte 0x01; the fields
//! (32-bit big-endian length, bytes) cluster id, ticket or token id, secret (16 bytes), root pin (32 bytes:
//! SHA-256 of the root's public key info), each endpoint `host:port`; and the first four bytes of SHA-256
//! over prefix and all before. The checksum finds typing errors; the secret is what protects.
//!
//! Invariants: the text is never longer than [`MAX_TEXT`]; parsing accepts only what formatting makes.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::{Zeroize, Zeroizing};

use crate::Entropy;
use crate::codec::{Fields, derive, sha256};
use crate::entropy::draw;
use crate::identity::is_ulid;

/// The longest text of a ticket or join token, in characters.
pub const MAX_TEXT: usize = 4096;
/// The most endpoints in a ticket or join token.
pub const MAX_ENDPOINTS: usize = 9;
/// The longest endpoint, in characters.
pub const MAX_ENDPOINT: usize = 260;

const FORM: u8 = 1;
const CHECKSUM: usize = 4;

/// Why a text is no ticket or join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TicketError {
    /// Something else was pasted, perhaps the other of the two kinds.
    #[error("the text has to begin with {expected:?}{}", if *.other { "; this is another kind" } else { "" })]
    Prefix {
        /// The prefix that was expected.
        expected: &'static str,
        /// Whether the text begins with the prefix of the other kind.
        other: bool,
    },
    /// Longer than [`MAX_TEXT`].
    #[error("the text has {0} characters, more than the {MAX_TEXT} allowed")]
    TooLong(usize),
    /// Characters that aren't base64url.
    #[error("the text holds characters that do not belong in it; copy it again, in one piece")]
    Characters,
    /// The checksum is wrong: characters are missing or changed.
    #[error("the text is damaged: characters are missing or changed; copy it again, in one piece")]
    Checksum,
    /// Made by a newer release.
    #[error("the text is of form {0}, which this release does not know; update this program")]
    Form(u8),
    /// A part is missing or has the wrong size.
    #[error("the text has no valid {0}")]
    Part(&'static str),
    /// An endpoint isn't `host:port`.
    #[error("{0:?} is no endpoint: expected host:port")]
    Endpoint(String),
    /// None, or more than [`MAX_ENDPOINTS`].
    #[error("{0} endpoints; 1 to {MAX_ENDPOINTS} are allowed")]
    EndpointCount(usize),
}

/// A secret of 128 uniform bits. Zeroized on drop, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 16]);

impl Secret {
    /// Draws a new secret.
    pub fn generate(rng: &mut dyn Entropy) -> Self {
        Self(draw(rng))
    }

    /// Takes exactly 16 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TicketError> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| TicketError::Part("secret"))
    }

    /// The bytes. Seal them before they are stored.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A pairing ticket: everything that a node needs to find a cluster, to know that it is the right one, and to
/// prove that it was invited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The cluster's id, a ULID.
    pub cluster_id: String,
    /// The ticket's id, a ULID; not secret.
    pub id: String,
    /// The secret that the node proves to have.
    pub secret: Secret,
    /// SHA-256 of the root's public key info.
    pub root_pin: [u8; 32],
    /// Enrol listeners, `host:port`, 1 to [`MAX_ENDPOINTS`].
    pub endpoints: Vec<String>,
}

impl Ticket {
    /// What every ticket begins with.
    pub const PREFIX: &'static str = "palyra-ticket.";

    /// The text to show. Refuses ids that are no ULIDs and endpoints that are none, too many or ill-formed.
    pub fn to_text(&self) -> Result<Zeroizing<String>, TicketError> {
        encode(
            Self::PREFIX,
            &self.cluster_id,
            &self.id,
            &self.secret,
            &self.root_pin,
            &self.endpoints,
        )
    }

    /// Reads a ticket; space around it is ignored.
    pub fn parse(text: &str) -> Result<Self, TicketError> {
        let (cluster_id, id, secret, root_pin, endpoints) = decode(Self::PREFIX, JoinToken::PREFIX, text)?;
        Ok(Self {
            cluster_id,
            id,
            secret,
            root_pin,
            endpoints,
        })
    }

    /// The key of the pairing proofs; what the cluster keeps, sealed, instead of the secret.
    pub fn key(&self) -> Zeroizing<[u8; 32]> {
        ticket_key(&self.secret, &self.cluster_id, &self.id)
    }
}

/// The key of a ticket's pairing proofs: HMAC-SHA256(secret, fields(`palyra ticket v1 key`, cluster id,
/// ticket id)).
pub fn ticket_key(secret: &Secret, cluster_id: &str, ticket_id: &str) -> Zeroizing<[u8; 32]> {
    let context = [cluster_id.as_bytes(), ticket_id.as_bytes()];
    Zeroizing::new(derive(secret.as_bytes(), "palyra ticket v1 key", &context))
}

/// A join token: what a new replica needs to find its cluster, to know it, and to prove that it was invited.
/// The secret also protects the key encryption key on its way, see [`crate::join`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The cluster's id, a ULID.
    pub cluster_id: String,
    /// The token's id, a ULID; not secret.
    pub id: String,
    /// The secret that the replica proves to have.
    pub secret: Secret,
    /// SHA-256 of the root's public key info.
    pub root_pin: [u8; 32],
    /// Enrol listeners, `host:port`, 1 to [`MAX_ENDPOINTS`].
    pub endpoints: Vec<String>,
}

impl JoinToken {
    /// What every join token begins with.
    pub const PREFIX: &'static str = "palyra-join.";

    /// The text to show; same refusals as [`Ticket::to_text`].
    pub fn to_text(&self) -> Result<Zeroizing<String>, TicketError> {
        encode(
            Self::PREFIX,
            &self.cluster_id,
            &self.id,
            &self.secret,
            &self.root_pin,
            &self.endpoints,
        )
    }

    /// Reads a join token; space around it is ignored.
    pub fn parse(text: &str) -> Result<Self, TicketError> {
        let (cluster_id, id, secret, root_pin, endpoints) = decode(Self::PREFIX, Ticket::PREFIX, text)?;
        Ok(Self {
            cluster_id,
            id,
            secret,
            root_pin,
            endpoints,
        })
    }
}

/// Whether `text` is `host:port` with a host name, an IPv4 address or an IPv6 address in brackets, and a port
/// from 1 to 65535.
pub fn check_endpoint(text: &str) -> Result<(), TicketError> {
    let bad = || TicketError::Endpoint(text.chars().take(MAX_ENDPOINT).collect());
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let port_fits = !port.starts_with(['0', '+']) && port.parse::<u16>().is_ok_and(|port| port > 0);
    let host_fits = match host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
            !host.is_empty() && host.bytes().all(plain)
        }
    };
    if text.len() <= MAX_ENDPOINT && port_fits && host_fits {
        Ok(())
    } else {
        Err(bad())
    }
}

/// Whether a list of endpoints may be put into a ticket, token or credential.
pub fn check_endpoints(endpoints: &[String]) -> Result<(), TicketError> {
    if endpoints.is_empty() || endpoints.len() > MAX_ENDPOINTS {
        return Err(TicketError::EndpointCount(endpoints.len()));
    }
    endpoints.iter().try_for_each(|endpoint| check_endpoint(endpoint))
}

fn checksum(prefix: &str, body: &[u8]) -> [u8; CHECKSUM] {
    let mut all = Zeroizing::new(prefix.as_bytes().to_vec());
    all.extend_from_slice(body);
    let mut out = [0u8; CHECKSUM];
    out.copy_from_slice(&sha256(&all)[..CHECKSUM]);
    out
}

fn encode(
    prefix: &'static str,
    cluster_id: &str,
    id: &str,
    secret: &Secret,
    root_pin: &[u8; 32],
    endpoints: &[String],
) -> Result<Zeroizing<String>, TicketError> {
    if !is_ulid(cluster_id) {
        return Err(TicketError::Part("cluster id"));
    }
    if !is_ulid(id) {
        return Err(TicketError::Part("id"));
    }
    check_endpoints(endpoints)?;
    let mut fields = Fields::default();
    for part in [
        cluster_id.as_bytes(),
        id.as_bytes(),
        secret.as_bytes().as_slice(),
        root_pin.as_slice(),
    ] {
        fields.push(part);
    }
    for endpoint in endpoints {
        fields.push(endpoint.as_bytes());
    }
    let mut body = Zeroizing::new(vec![FORM]);
    body.extend_from_slice(fields.as_bytes());
    let sum = checksum(prefix, &body);
    body.extend_from_slice(&sum);
    let mut text = Zeroizing::new(String::with_capacity(MAX_TEXT));
    text.push_str(prefix);
    URL_SAFE_NO_PAD.encode_string(body.as_slice(), &mut text);
    if text.len() > MAX_TEXT {
        Err(TicketError::TooLong(text.len()))
    } else {
        Ok(text)
    }
}

type Parts = (String, String, Secret, [u8; 32], Vec<String>);

fn decode(prefix: &'static str, other: &'static str, text: &str) -> Result<Parts, TicketError> {
    let text = text.trim();
    if text.len() > MAX_TEXT {
        return Err(TicketError::TooLong(text.len()));
    }
    let encoded = text.strip_prefix(prefix).ok_or(TicketError::Prefix {
        expected: prefix,
        other: text.starts_with(other),
    })?;
    let body = Zeroizing::new(
        URL_SAFE_NO_PAD
            .decode(encoded)
            .map_err(|_| TicketError::Characters)?,
    );
    let Some((content, sum)) = body.split_last_chunk::<CHECKSUM>() else {
        return Err(TicketError::Checksum);
    };
    if checksum(prefix, content) != *sum {
        return Err(TicketError::Checksum);
    }
    let (form, mut rest) = content.split_first().ok_or(TicketError::Checksum)?;
    if *form != FORM {
        return Err(TicketError::Form(*form));
    }
    let cluster_id = ulid_field(&mut rest, "cluster id")?;
    let id = ulid_field(&mut rest, "id")?;
    let secret = Secret::from_bytes(take(&mut rest, "secret")?)?;
    let pin = take(&mut rest, "root pin")?;
    let root_pin = pin.try_into().map_err(|_| TicketError::Part("root pin"))?;
    let mut endpoints = Vec::new();
    while !rest.is_empty() {
        if endpoints.len() == MAX_ENDPOINTS {
            return Err(TicketError::EndpointCount(MAX_ENDPOINTS + 1));
        }
        let endpoint =
            std::str::from_utf8(take(&mut rest, "endpoint")?).map_err(|_| TicketError::Part("endpoint"))?;
        endpoints.push(endpoint.to_owned());
    }
    check_endpoints(&endpoints)?;
    Ok((cluster_id, id, secret, root_pin, endpoints))
}

fn take<'a>(rest: &mut &'a [u8], what: &'static str) -> Result<&'a [u8], TicketError> {
    let (length, tail) = rest.split_first_chunk::<4>().ok_or(TicketError::Part(what))?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| TicketError::Part(what))?;
    if length > tail.len() {
        return Err(TicketError::Part(what));
    }
    let (field, tail) = tail.split_at(length);
    *rest = tail;
    Ok(field)
}

fn ulid_field(rest: &mut &[u8], what: &'static str) -> Result<String, TicketError> {
    let text = std::str::from_utf8(take(rest, what)?).map_err(|_| TicketError::Part(what))?;
    if is_ulid(text) {
        Ok(text.to_owned())
    } else {
        Err(TicketError::Part(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CLUSTER, DEVICE, Seeded};

    fn ticket(endpoints: &[&str]) -> Ticket {
        Ticket {
            cluster_id: CLUSTER.to_owned(),
            id: DEVICE.to_owned(),
            secret: Secret::generate(&mut Seeded::new(1)),
            root_pin: [7; 32],
            endpoints: endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect(),
        }
    }

    #[test]
    fn texts_are_read_back() {
        let made = ticket(&["127.0.0.1:7442", "[::1]:7452", "r3.example.org:7462"]);
        let text = made.to_text().unwrap();
        assert_eq!(Ticket::parse(&format!("  {}\n", *text)).unwrap(), made);
        let token = JoinToken {
            cluster_id: made.cluster_id.clone(),
            id: made.id.clone(),
            secret: made.secret.clone(),
            root_pin: made.root_pin,
            endpoints: made.endpoints.clone(),
        };
        assert_eq!(JoinToken::parse(&token.to_text().unwrap()).unwrap(), token);
        assert!(!format!("{made:?}").contains(&hex::encode(made.secret.as_bytes())));
    }

    #[test]
    fn the_other_kind_is_named() {
        let text = ticket(&["a:1"]).to_text().unwrap();
        let error = JoinToken::parse(&text).unwrap_err();
        assert_eq!(
            error,
            TicketError::Prefix {
                expected: "palyra-join.",
                other: true
            }
        );
        // The prefix is part of the checksum, so exchanging it by hand doesn't help.
        let forged = text.replace(Ticket::PREFIX, JoinToken::PREFIX);
        assert_eq!(JoinToken::parse(&forged).unwrap_err(), TicketError::Checksum);
        assert!(matches!(
            Ticket::parse("12345678").unwrap_err(),
            TicketError::Prefix { other: false, .. }
        ));
    }

    #[test]
    fn damage_is_found() {
        let text = ticket(&["127.0.0.1:7442"]).to_text().unwrap();
        for cut in 0..text.len() {
            assert!(Ticket::parse(&text[..cut]).is_err(), "cut at {cut}");
        }
        for index in Ticket::PREFIX.len()..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[index] = if bytes[index] == b'A' { b'B' } else { b'A' };
            assert!(
                Ticket::parse(std::str::from_utf8(&bytes).unwrap()).is_err(),
                "changed at {index}"
            );
        }
        assert_eq!(
            Ticket::parse("palyra-ticket.a b").unwrap_err(),
            TicketError::Characters
        );
        assert_eq!(
            Ticket::parse(&"x".repeat(5000)).unwrap_err(),
            TicketError::TooLong(5000)
        );
    }

    fn forged(form: u8, fields: &[&[u8]]) -> String {
        let mut encoded = Fields::default();
        for field in fields {
            encoded.push(field);
        }
        let mut body = vec![form];
        body.extend_from_slice(encoded.as_bytes());
        let sum = checksum(Ticket::PREFIX, &body);
        body.extend_from_slice(&sum);
        format!("{}{}", Ticket::PREFIX, URL_SAFE_NO_PAD.encode(body))
    }

    #[test]
    fn a_right_checksum_is_not_enough() {
        let (cluster, id, secret, pin) = (CLUSTER.as_bytes(), DEVICE.as_bytes(), [1u8; 16], [2u8; 32]);
        let good: [&[u8]; 5] = [cluster, id, &secret, &pin, b"a:1"];
        assert!(Ticket::parse(&forged(1, &good)).is_ok());
        assert_eq!(
            Ticket::parse(&forged(2, &good)).unwrap_err(),
            TicketError::Form(2)
        );
        let cases: [(&[&[u8]], TicketError); 6] = [
            (&good[..4], TicketError::EndpointCount(0)),
            (&good[..2], TicketError::Part("secret")),
            (
                &[b"not a ulid", id, &secret, &pin, b"a:1"],
                TicketError::Part("cluster id"),
            ),
            (
                &[cluster, id, &secret[..15], &pin, b"a:1"],
                TicketError::Part("secret"),
            ),
            (
                &[cluster, id, &secret, &pin[..31], b"a:1"],
                TicketError::Part("root pin"),
            ),
            (
                &[cluster, id, &secret, &pin, b"a"],
                TicketError::Endpoint("a".to_owned()),
            ),
        ];
        for (fields, expected) in cases {
            assert_eq!(Ticket::parse(&forged(1, fields)).unwrap_err(), expected);
        }
        let mut many: Vec<&[u8]> = good[..4].to_vec();
        many.extend(std::iter::repeat_n(b"a:1".as_slice(), 10));
        assert_eq!(
            Ticket::parse(&forged(1, &many)).unwrap_err(),
            TicketError::EndpointCount(10)
        );
    }

    #[test]
    fn endpoints_are_checked() {
        for good in ["a:1", "127.0.0.1:65535", "[::1]:7442", "r-1.example_x.org:7442"] {
            assert!(check_endpoint(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            ":1",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a:01",
            "::1:7442",
            "[x]:1",
            "a b:1",
            "http://a:1",
        ] {
            assert!(check_endpoint(bad).is_err(), "{bad}");
        }
        assert!(ticket(&[]).to_text().is_err());
        let long = "h".repeat(250) + ":7442";
        let most = ticket(&[long.as_str(); 9]).to_text().unwrap();
        assert!(most.len() <= MAX_TEXT);
        assert_eq!(
            ticket(&["a:1"; 10]).to_text().unwrap_err(),
            TicketError::EndpointCount(10)
        );
    }

    #[test]
    fn the_key_depends_on_cluster_and_ticket() {
        let one = ticket(&["a:1"]);
        let mut other = one.clone();
        other.id = CLUSTER.to_owned();
        assert_ne!(*one.key(), *other.key());
    }
}

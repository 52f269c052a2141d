//! The eight digits: how they are made, written and read, and the PAKE that lets both sides prove them.
//!
//! The PAKE is OPAQUE (RFC 9807, `opaque-ke`): ristretto255, SHA-512, triple Diffie-Hellman, Argon2id. The
//! side that mints the PIN registers it with itself; what it keeps is a [`PinVerifier`], from which the PIN
//! can only be found by trying, at the price of one Argon2id each. Keep it sealed.
//!
//! What never lives here: counting attempts. A client learns from the second message whether its guess was
//! right, so the attempt must be counted, durably, BEFORE [`server_begin`]'s answer leaves the process.
//!
//! Invariants: both sides bind the context (all of the transcript that is known before the second message),
//! so messages taken from one connection are worthless on another; a PIN is never printed by `Debug`.

use std::fmt;

use opaque_ke::argon2::{Algorithm, Argon2, Params, Version};
use opaque_ke::errors::ProtocolError;
use opaque_ke::{
    CipherSuite, ClientLogin, ClientLoginFinishParameters, ClientRegistration,
    ClientRegistrationFinishParameters, CredentialFinalization, CredentialRequest, CredentialResponse,
    Identifiers, Ristretto255, ServerLogin, ServerLoginParameters, ServerRegistration, ServerSetup, TripleDh,
};
use sha2::Sha512;
use zeroize::{Zeroize, Zeroizing};

use crate::Entropy;
use crate::entropy::{Adapter, draw};

/// How many digits a PIN has.
pub const DIGITS: usize = 8;
/// The length of the first message, client to server, in bytes.
pub const KE1_LEN: usize = 96;
/// The length of the second message, server to client, in bytes.
pub const KE2_LEN: usize = 320;
/// The length of the third message, client to server, in bytes.
pub const KE3_LEN: usize = 64;
/// The length of the key that both sides end with, in bytes.
pub const SESSION_KEY_LEN: usize = 64;
/// Argon2id memory in KiB, passes and lanes: the floor that OWASP recommends, so that a small node can pay
/// it.
pub const ARGON2: (u32, u32, u32) = (19 * 1024, 2, 1);

const SETUP_LEN: usize = 128;
const REGISTRATION_LEN: usize = 192;
const FORM: u8 = 1;

/// Why a PIN or a PAKE message is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// Not eight digits.
    #[error("a PIN has {DIGITS} digits; spaces and dashes between them are ignored")]
    Form,
    /// The other side holds another PIN, or somebody sits in between.
    #[error("the PIN is wrong, or somebody sits between this machine and the cluster")]
    WrongPin,
    /// The client's proof of the PIN is wrong.
    #[error("the proof of the PIN is wrong")]
    WrongProof,
    /// A message is truncated, oversized or no message at all.
    #[error("the {0} message of the PIN exchange is malformed")]
    Malformed(&'static str),
    /// What the cluster kept for the code is unusable.
    #[error("the stored half of the PIN code is unusable")]
    Verifier,
    /// The protocol library failed in itself.
    #[error("the PIN exchange failed: {0}")]
    Internal(String),
}

struct Suite;

impl CipherSuite for Suite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, Sha512>;
    type Ksf = Argon2<'static>;
}

/// Eight decimal digits. Zeroized on drop, never printed by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Pin([u8; DIGITS]);

impl Pin {
    /// Draws a PIN uniformly: four bytes at a time, values from 4,200,000,000 on are drawn again.
    pub fn generate(rng: &mut dyn Entropy) -> Self {
        const SPACE: u32 = 100_000_000;
        const LIMIT: u32 = u32::MAX - u32::MAX % SPACE;
        loop {
            let candidate = u32::from_le_bytes(draw(rng));
            if candidate < LIMIT {
                let mut digits = [0u8; DIGITS];
                let mut rest = candidate % SPACE;
                for slot in digits.iter_mut().rev() {
                    *slot = b'0' + (rest % 10) as u8;
                    rest /= 10;
                }
                return Self(digits);
            }
        }
    }

    /// Reads what a person typed: eight digits, with any spaces and dashes around and between them.
    pub fn parse(text: &str) -> Result<Self, PinError> {
        if text.len() > 64 {
            return Err(PinError::Form);
        }
        let mut digits = Zeroizing::new(Vec::with_capacity(64));
        for symbol in text.chars() {
            match symbol {
                '0'..='9' => digits.push(symbol as u8),
                ' ' | '\t' | '\r' | '\n' | '-' | '\u{2013}' | '\u{a0}' => {}
                _ => return Err(PinError::Form),
            }
        }
        digits.as_slice().try_into().map(Self).map_err(|_| PinError::Form)
    }

    /// The PIN to show to a person: `4821 9034`.
    pub fn grouped(&self) -> Zeroizing<String> {
        let (left, right) = self.0.split_at(DIGITS / 2);
        let group = |digits: &[u8]| digits.iter().map(|digit| char::from(*digit)).collect::<String>();
        Zeroizing::new(format!("{} {}", group(left), group(right)))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pin(..)")
    }
}

/// What the cluster keeps for a PIN code: the server's OPAQUE setup and the registration. Seal it.
#[derive(Clone)]
pub struct PinVerifier(Zeroizing<Vec<u8>>);

impl PinVerifier {
    /// The bytes to seal and store: one byte 0x01, 128 bytes setup, 192 bytes registration.
    pub fn to_bytes(&self) -> &Zeroizing<Vec<u8>> {
        &self.0
    }

    /// Reads what [`PinVerifier::to_bytes`] made; checks form and length, the content when it is used.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PinError> {
        if bytes.len() != 1 + SETUP_LEN + REGISTRATION_LEN || bytes[0] != FORM {
            return Err(PinError::Verifier);
        }
        Ok(Self(Zeroizing::new(bytes.to_vec())))
    }

    fn parts(&self) -> Result<(ServerSetup<Suite>, ServerRegistration<Suite>), PinError> {
        let (setup, registration) = self.0[1..].split_at(SETUP_LEN);
        let setup = ServerSetup::deserialize(setup).map_err(|_| PinError::Verifier)?;
        let registration = ServerRegistration::deserialize(registration).map_err(|_| PinError::Verifier)?;
        Ok((setup, registration))
    }
}

impl fmt::Debug for PinVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PinVerifier(..)")
    }
}

/// The key that both sides share after the exchange: 64 bytes, zeroized on drop.
pub type SessionKey = Zeroizing<[u8; SESSION_KEY_LEN]>;

/// What the replica keeps in memory between the second and the third message.
pub struct ServerState {
    login: ServerLogin<Suite>,
    context: Vec<u8>,
}

/// What the node keeps between the first and the second message.
pub struct ClientState(ClientLogin<Suite>);

impl fmt::Debug for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerState(..)")
    }
}

impl fmt::Debug for ClientState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientState(..)")
    }
}

/// Registers a PIN under a code id (the id is part of what the verifier is good for). Takes one Argon2id:
/// tens of milliseconds and 19 MiB, so run it off the async threads.
pub fn mint(pin: &Pin, code_id: &str, rng: &mut dyn Entropy) -> Result<PinVerifier, PinError> {
    let mut rng = Adapter(rng);
    let setup = ServerSetup::<Suite>::new(&mut rng);
    let begun = ClientRegistration::<Suite>::start(&mut rng, &pin.0).map_err(internal)?;
    let answer = ServerRegistration::start(&setup, begun.message, code_id.as_bytes()).map_err(internal)?;
    let stretch = stretch()?;
    let parameters = ClientRegistrationFinishParameters::new(Identifiers::default(), Some(&stretch));
    let upload = begun
        .state
        .finish(&mut rng, &pin.0, answer.message, parameters)
        .map_err(internal)?;
    let registration = ServerRegistration::finish(upload.message);
    let mut bytes = Zeroizing::new(Vec::with_capacity(1 + SETUP_LEN + REGISTRATION_LEN));
    bytes.push(FORM);
    bytes.extend_from_slice(&setup.serialize());
    bytes.extend_from_slice(&registration.serialize());
    Ok(PinVerifier(bytes))
}

/// The node's first message. Drawn anew for each attempt.
pub fn client_begin(pin: &Pin, rng: &mut dyn Entropy) -> Result<(ClientState, Vec<u8>), PinError> {
    let begun = ClientLogin::<Suite>::start(&mut Adapter(rng), &pin.0).map_err(internal)?;
    Ok((ClientState(begun.state), begun.message.serialize().to_vec()))
}

/// Checks the first message by itself: its length, and that its points are points. What is refused here need
/// not be counted, as nothing was asked about the PIN.
pub fn check_first(ke1: &[u8]) -> Result<(), PinError> {
    first(ke1).map(drop)
}

fn first(ke1: &[u8]) -> Result<CredentialRequest<Suite>, PinError> {
    if ke1.len() != KE1_LEN {
        return Err(PinError::Malformed("first"));
    }
    CredentialRequest::deserialize(ke1).map_err(|_| PinError::Malformed("first"))
}

/// The replica's answer to the first message. `context` is
/// [`crate::transcript::Transcript::context`]. Count the attempt before the answer is sent.
pub fn server_begin(
    verifier: &PinVerifier,
    code_id: &str,
    context: &[u8],
    ke1: &[u8],
    rng: &mut dyn Entropy,
) -> Result<(ServerState, Vec<u8>), PinError> {
    let request = first(ke1)?;
    let (setup, registration) = verifier.parts()?;
    let parameters = ServerLoginParameters {
        context: Some(context),
        identifiers: Identifiers::default(),
    };
    let begun = ServerLogin::start(
        &mut Adapter(rng),
        &setup,
        Some(registration),
        request,
        code_id.as_bytes(),
        parameters,
    )
    .map_err(internal)?;
    let state = ServerState {
        login: begun.state,
        context: context.to_vec(),
    };
    Ok((state, begun.message.serialize().to_vec()))
}

/// The node's third message and the key. [`PinError::WrongPin`] says that the other side doesn't hold this
/// PIN or that the two sides disagree about the context: end the pairing, never try again without asking the
/// person. Takes one Argon2id.
pub fn client_finish(
    state: ClientState,
    pin: &Pin,
    context: &[u8],
    ke2: &[u8],
    rng: &mut dyn Entropy,
) -> Result<(Vec<u8>, SessionKey), PinError> {
    if ke2.len() != KE2_LEN {
        return Err(PinError::Malformed("second"));
    }
    let response =
        CredentialResponse::<Suite>::deserialize(ke2).map_err(|_| PinError::Malformed("second"))?;
    let stretch = stretch()?;
    let parameters = ClientLoginFinishParameters::new(Some(context), Identifiers::default(), Some(&stretch));
    let finished = state
        .0
        .finish(&mut Adapter(rng), &pin.0, response, parameters)
        .map_err(|error| match error {
            ProtocolError::InvalidLoginError | ProtocolError::ReflectedValueError => PinError::WrongPin,
            other => internal(other),
        })?;
    Ok((finished.message.serialize().to_vec(), key(&finished.session_key)?))
}

/// Checks the node's third message and answers the key.
pub fn server_finish(state: ServerState, ke3: &[u8]) -> Result<SessionKey, PinError> {
    if ke3.len() != KE3_LEN {
        return Err(PinError::Malformed("third"));
    }
    let message =
        CredentialFinalization::<Suite>::deserialize(ke3).map_err(|_| PinError::Malformed("third"))?;
    let parameters = ServerLoginParameters {
        context: Some(&state.context),
        identifiers: Identifiers::default(),
    };
    let finished = state
        .login
        .finish(message, parameters)
        .map_err(|_| PinError::WrongProof)?;
    key(&finished.session_key)
}

fn key(bytes: &[u8]) -> Result<SessionKey, PinError> {
    let key = bytes
        .try_into()
        .map_err(|_| PinError::Internal("session key length".to_owned()))?;
    Ok(Zeroizing::new(key))
}

fn stretch() -> Result<Argon2<'static>, PinError> {
    let (memory, passes, lanes) = ARGON2;
    let params =
        Params::new(memory, passes, lanes, None).map_err(|error| PinError::Internal(error.to_string()))?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

fn internal(error: ProtocolError) -> PinError {
    PinError::Internal(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Seeded;

    fn pin(text: &str) -> Pin {
        Pin::parse(text).unwrap()
    }

    #[test]
    fn pins_are_written_and_read() {
        for text in [
            "48219034",
            "4821 9034",
            " 4821-9034\n",
            "4-8-2-1-9-0-3-4",
            "4821\u{2013}9034",
        ] {
            assert_eq!(pin(text).grouped().as_str(), "4821 9034", "{text:?}");
        }
        for bad in [
            "",
            "4821903",
            "482190345",
            "4821903a",
            "４８２１９０３４",
            &" ".repeat(100),
        ] {
            assert_eq!(Pin::parse(bad), Err(PinError::Form), "{bad:?}");
        }
        assert_eq!(format!("{:?}", pin("48219034")), "Pin(..)");
    }

    #[test]
    fn pins_are_uniform_by_rejection() {
        let mut draws = vec![
            [0xff; 4],
            4_200_000_000u32.to_le_bytes(),
            4_199_999_999u32.to_le_bytes(),
        ]
        .into_iter();
        let drawn = Pin::generate(&mut |out: &mut [u8]| out.copy_from_slice(&draws.next().unwrap()));
        assert_eq!(
            drawn.grouped().as_str(),
            "9999 9999",
            "values from the limit on are drawn again"
        );
        let zero = Pin::generate(&mut |out: &mut [u8]| out.fill(0));
        assert_eq!(zero.grouped().as_str(), "0000 0000");
        let mut counts = [[0u32; 10]; DIGITS];
        let mut rng = Seeded::new(1);
        for _ in 0..4000 {
            for (place, digit) in Pin::generate(&mut rng).0.iter().enumerate() {
                counts[place][usize::from(digit - b'0')] += 1;
            }
        }
        assert!(
            counts.iter().flatten().all(|count| (300..500).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn the_right_pin_gives_both_sides_one_key() {
        let mut rng = Seeded::new(2);
        let verifier = mint(&pin("48219034"), "CODE", &mut rng).unwrap();
        let verifier = PinVerifier::from_bytes(verifier.to_bytes()).unwrap();
        let (client, ke1) = client_begin(&pin("4821 9034"), &mut rng).unwrap();
        let (server, ke2) = server_begin(&verifier, "CODE", b"context", &ke1, &mut rng).unwrap();
        let (ke3, ours) = client_finish(client, &pin("48219034"), b"context", &ke2, &mut rng).unwrap();
        let theirs = server_finish(server, &ke3).unwrap();
        assert_eq!(ours, theirs);
        assert_eq!((ke1.len(), ke2.len(), ke3.len()), (KE1_LEN, KE2_LEN, KE3_LEN));
    }

    #[test]
    fn a_wrong_pin_code_or_context_is_noticed_by_the_client() {
        let mut rng = Seeded::new(3);
        let verifier = mint(&pin("48219034"), "CODE", &mut rng).unwrap();
        for (typed, code, context) in [
            ("48219035", "CODE", "context"),
            ("48219034", "CODX", "context"),
            ("48219034", "CODE", "other"),
        ] {
            let (client, ke1) = client_begin(&pin(typed), &mut rng).unwrap();
            let (_, ke2) = server_begin(&verifier, code, b"context", &ke1, &mut rng).unwrap();
            let finished = client_finish(client, &pin(typed), context.as_bytes(), &ke2, &mut rng);
            assert_eq!(
                finished.unwrap_err(),
                PinError::WrongPin,
                "{typed} {code} {context}"
            );
        }
    }

    #[test]
    fn a_replayed_or_bent_third_message_is_refused() {
        let mut rng = Seeded::new(4);
        let verifier = mint(&pin("48219034"), "CODE", &mut rng).unwrap();
        let (client, ke1) = client_begin(&pin("48219034"), &mut rng).unwrap();
        let (server, ke2) = server_begin(&verifier, "CODE", b"one", &ke1, &mut rng).unwrap();
        let (ke3, _) = client_finish(client, &pin("48219034"), b"one", &ke2, &mut rng).unwrap();
        let (again, _) = server_begin(&verifier, "CODE", b"two", &ke1, &mut rng).unwrap();
        assert_eq!(server_finish(again, &ke3).unwrap_err(), PinError::WrongProof);
        let mut bent = ke3.clone();
        bent[0] ^= 1;
        assert_eq!(server_finish(server, &bent).unwrap_err(), PinError::WrongProof);
    }

    #[test]
    fn malformed_messages_are_refused() {
        let mut rng = Seeded::new(5);
        let verifier = mint(&pin("48219034"), "CODE", &mut rng).unwrap();
        let (client, ke1) = client_begin(&pin("48219034"), &mut rng).unwrap();
        let malformed = |bytes: &[u8], rng: &mut Seeded| {
            server_begin(&verifier, "CODE", b"", bytes, rng)
                .map(|_| ())
                .unwrap_err()
        };
        for bytes in [
            &ke1[..KE1_LEN - 1],
            &[],
            &[0xff; KE1_LEN],
            &[0; KE1_LEN],
            &[1; 4096],
        ] {
            assert_eq!(malformed(bytes, &mut rng), PinError::Malformed("first"));
            assert_eq!(check_first(bytes), Err(PinError::Malformed("first")));
        }
        assert_eq!(check_first(&ke1), Ok(()));
        let (server, ke2) = server_begin(&verifier, "CODE", b"", &ke1, &mut rng).unwrap();
        let cut = client_finish(client, &pin("48219034"), b"", &ke2[1..], &mut rng);
        assert_eq!(cut.unwrap_err(), PinError::Malformed("second"));
        assert_eq!(
            server_finish(server, &[0; 63]).unwrap_err(),
            PinError::Malformed("third")
        );
        assert!(PinVerifier::from_bytes(&verifier.to_bytes()[1..]).is_err());
        let mut other_form = verifier.to_bytes().to_vec();
        other_form[0] = 2;
        assert!(PinVerifier::from_bytes(&other_form).is_err());
        let junk = PinVerifier::from_bytes(&[&[FORM][..], &[0xff; 320]].concat()).unwrap();
        assert!(matches!(
            server_begin(&junk, "CODE", b"", &ke1, &mut rng),
            Err(PinError::Verifier)
        ));
    }

    #[test]
    fn a_reflected_message_is_refused() {
        let mut rng = Seeded::new(6);
        let (client, ke1) = client_begin(&pin("48219034"), &mut rng).unwrap();
        let mut ke2 = ke1[..32].to_vec();
        ke2.resize(KE2_LEN, 0);
        assert!(client_finish(client, &pin("48219034"), b"", &ke2, &mut rng).is_err());
    }
}

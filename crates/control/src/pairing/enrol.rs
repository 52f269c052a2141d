//! The enrol listener's calls: a machine proves a PIN or a ticket.
//!
//! What never lives here: who may become a node; an operator decides that.
//! Invariants: what can be refused without a secret is refused first, before anything is counted or taken; a
//! PIN attempt is committed before its second message is answered, a wrong ticket proof before it is refused;
//! a machine learns nothing of a secret from the order or the kind of refusals.

use bytes::Bytes;
use palyra_pki::pin::{KE1_LEN, KE3_LEN, PinError, PinVerifier};
use palyra_pki::seal::Purpose;
use palyra_pki::transcript::{self, Opening};
use palyra_pki::{Method as ProofMethod, Transcript, TrustBundle, keys, pin, sha256};
use palyra_platform as platform;
use palyra_state::pairing::{self as records, Code as CodeRecord, Method, Prove};
use palyra_state::{Code, Digest, Fingerprint, Id, Reject, Reply, limits};
use zeroize::Zeroizing;

use crate::caller::EnrolSource;
use crate::control::Control;
use crate::error::{Error, Refusal};
use crate::pairing::exchange::{self, PinExchange, Proof, Stage, exactly_32};
use crate::selector::parse_exact_id;

/// What a machine needs before it can prove a ticket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The cluster.
    pub cluster_id: Id,
    /// Good for one proof within two minutes, on this connection.
    pub server_nonce: [u8; 32],
    /// This replica.
    pub replica_id: u64,
}

/// The first message of a PIN exchange.
#[derive(Debug, Clone)]
pub struct BeginPin {
    /// Which code; 0: the only open PIN.
    pub code_number: u32,
    /// The id that the machine wants, a ULID.
    pub device_id: String,
    /// OPAQUE's first message.
    pub ke1: Bytes,
    /// SHA-256 of the CSR that will be proved.
    pub csr_sha256: Bytes,
    /// 32 random bytes of the machine's.
    pub node_nonce: Bytes,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinBegun {
    /// Names the exchange, on this connection, for two minutes.
    pub attempt_id: Id,
    /// The code.
    pub code_id: Id,
    /// The cluster.
    pub cluster_id: Id,
    /// OPAQUE's second message.
    pub ke2: Vec<u8>,
    /// 32 random bytes of ours.
    pub server_nonce: [u8; 32],
    /// This replica.
    pub replica_id: u64,
    /// Attempts left after this one.
    pub tries_left: u32,
}

/// The last message of a PIN exchange.
#[derive(Debug, Clone)]
pub struct FinishPin {
    /// From [`PinBegun`].
    pub attempt_id: String,
    /// OPAQUE's third message.
    pub ke3: Bytes,
    /// The CSR, DER.
    pub csr: Bytes,
    /// The node's proof over the transcript.
    pub proof: Bytes,
    /// What the machine calls itself.
    pub device_name: String,
}

/// The one message of a ticket exchange.
#[derive(Debug, Clone)]
pub struct ProveTicket {
    /// The ticket's id.
    pub ticket_id: String,
    /// The id that the machine wants, a ULID.
    pub device_id: String,
    /// The CSR, DER.
    pub csr: Bytes,
    /// 32 random bytes of the machine's.
    pub node_nonce: Bytes,
    /// From [`Hello`].
    pub server_nonce: Bytes,
    /// The node's proof over the transcript.
    pub proof: Bytes,
    /// What the machine calls itself.
    pub device_name: String,
}

/// The proof was right, and an operator is asked.
#[derive(Debug, Clone)]
pub struct ProofAccepted {
    /// The pairing request.
    pub pairing_id: Id,
    /// The six digits that the operator sees too.
    pub sas: String,
    /// What to trust.
    pub trust: TrustBundle,
    /// Our proof, over the transcript and the bundle.
    pub server_proof: [u8; 32],
    /// First moment at which it can be decided no more.
    pub expires_at_ms: u64,
}

impl Control {
    /// Gives a nonce for a ticket proof.
    ///
    /// # Errors
    /// [`Error::Busy`] when too many exchanges are half done.
    pub fn hello(&self, source: &EnrolSource) -> Result<Hello, Error> {
        let server_nonce = random_32();
        self.exchanges().put(server_nonce, source, Stage::Nonce)?;
        Ok(Hello {
            cluster_id: self.cluster_id(),
            server_nonce,
            replica_id: self.replica_id(),
        })
    }

    /// First step of a PIN pairing. The attempt is committed before the answer is made.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed message and [`Error::Busy`] when too many exchanges are half done,
    /// neither counted; what the state machine refuses: no such code, used, burned, expired, taken back,
    /// pairing closed.
    pub async fn begin_pin(&self, source: &EnrolSource, begin: BeginPin) -> Result<PinBegun, Error> {
        let device_id = parse_exact_id("device_id", &begin.device_id)?;
        let csr_sha256 = exactly_32("csr_sha256", &begin.csr_sha256)?;
        let node_nonce = exactly_32("node_nonce", &begin.node_nonce)?;
        check_length("ke1", &begin.ke1, KE1_LEN)?;
        pin::check_first(&begin.ke1).map_err(|error| malformed("ke1", error))?;
        self.exchanges().make_room(source)?;
        let code = None;
        let (counted, code) = self
            .count_attempt(source, device_id, code, begin.code_number, Method::Pin)
            .await?;
        let opened = self.unseal(Purpose::PinVerifier, &code)?;
        let verifier =
            PinVerifier::from_bytes(&opened).map_err(|error| Error::Internal(error.to_string()))?;
        let server_nonce = random_32();
        let opening = (ProofMethod::Pin, csr_sha256, node_nonce, server_nonce);
        let transcript = self.transcript(source, code.id, device_id, opening)?;
        let code_text = code.id.to_string();
        let context = transcript.context().to_vec();
        let answer = pin::server_begin(
            &verifier,
            &code_text,
            &context,
            &begin.ke1,
            &mut platform::fill_random,
        );
        let (server, ke2) = answer.map_err(|error| malformed("ke1", error))?;
        let attempt_id = counted.attempt_id;
        let transcript = transcript.with_messages(&begin.ke1, &ke2);
        let held = PinExchange {
            attempt_id,
            code_id: code.id,
            device_id,
            csr_sha256,
            server,
            transcript,
        };
        self.exchanges().put(
            exchange::attempt_key(attempt_id),
            source,
            Stage::Pin(Box::new(held)),
        )?;
        Ok(PinBegun {
            attempt_id,
            code_id: code.id,
            cluster_id: self.cluster_id(),
            ke2,
            server_nonce,
            replica_id: self.replica_id(),
            tries_left: counted.tries_left,
        })
    }

    /// Second step of a PIN pairing, on the connection of the first.
    ///
    /// # Errors
    /// [`Refusal::UnknownExchange`], [`Refusal::WrongPin`], [`Refusal::OtherCsr`], and what the state machine
    /// refuses; of two machines that prove one code, the second gets `used`.
    pub async fn finish_pin(&self, source: &EnrolSource, finish: FinishPin) -> Result<ProofAccepted, Error> {
        let attempt_id = parse_exact_id("attempt_id", &finish.attempt_id)?;
        check_length("ke3", &finish.ke3, KE3_LEN)?;
        check_device_name(&finish.device_name)?;
        let key = exchange::attempt_key(attempt_id);
        let message = digest_of(&[
            &finish.ke3,
            &finish.csr,
            &finish.proof,
            finish.device_name.as_bytes(),
        ]);
        let held = match self.exchanges().take(&key, source) {
            Some(Stage::Pin(held)) => *held,
            Some(Stage::Proved(proof)) => return self.prove_again(key, source, message, *proof, false).await,
            Some(Stage::Nonce) | None => return Err(exchange::unknown(false)),
        };
        let (attempt_id, code_id) = (held.attempt_id, held.code_id);
        match self.check_pin(held, &finish, source, message) {
            Ok(proof) => self.prove(key, source, proof).await,
            Err(error) => {
                self.fail_attempt(source, attempt_id, code_id).await;
                Err(error)
            }
        }
    }

    fn check_pin(
        &self,
        held: PinExchange,
        finish: &FinishPin,
        source: &EnrolSource,
        message: [u8; 32],
    ) -> Result<Proof, Error> {
        if sha256(&finish.csr) != held.csr_sha256 {
            return Err(Refusal::OtherCsr.into());
        }
        let spki = csr_key(&finish.csr)?;
        let key = pin::server_finish(held.server, &finish.ke3).map_err(|_| Refusal::WrongPin)?;
        if !held.transcript.check_node_proof(key.as_slice(), &finish.proof) {
            return Err(Refusal::WrongPin.into());
        }
        let prove = Prove {
            pairing_id: self.fresh_id(),
            attempt_id: Some(held.attempt_id),
            code_id: held.code_id,
            device_id: held.device_id,
            device_name: finish.device_name.clone(),
            csr_der: finish.csr.clone(),
            csr_spki: spki,
            sas: held.transcript.sas(key.as_slice()),
            source: source.address.clone(),
            served_by: self.replica_id(),
            fetch_token_hash: fetch_hash(&held.transcript, key.as_slice()),
        };
        let key = Zeroizing::new(key.to_vec());
        Ok(Proof {
            message,
            request_id: self.fresh_id(),
            prove,
            key,
            transcript: held.transcript,
        })
    }

    /// A ticket pairing, in one step after [`Control::hello`] on the same connection.
    ///
    /// # Errors
    /// [`Refusal::UnknownNonce`], [`Refusal::WrongTicket`], and what the state machine refuses.
    pub async fn prove_ticket(
        &self,
        source: &EnrolSource,
        ticket: ProveTicket,
    ) -> Result<ProofAccepted, Error> {
        let device_id = parse_exact_id("device_id", &ticket.device_id)?;
        let code_id = parse_exact_id("ticket_id", &ticket.ticket_id)?;
        let server_nonce = exactly_32("server_nonce", &ticket.server_nonce)?;
        let node_nonce = exactly_32("node_nonce", &ticket.node_nonce)?;
        check_device_name(&ticket.device_name)?;
        let spki = csr_key(&ticket.csr)?;
        let message = digest_of(&[
            ticket.ticket_id.as_bytes(),
            ticket.device_id.as_bytes(),
            &ticket.csr,
            &ticket.node_nonce,
            &ticket.proof,
            ticket.device_name.as_bytes(),
        ]);
        match self.exchanges().take(&server_nonce, source) {
            Some(Stage::Nonce) => {}
            Some(Stage::Proved(proof)) => {
                return self
                    .prove_again(server_nonce, source, message, *proof, true)
                    .await;
            }
            Some(Stage::Pin(_)) | None => return Err(exchange::unknown(true)),
        }
        // Before the proof is looked at: a code that is not open answers a right proof and a wrong one alike.
        self.may_begin(device_id, Some(code_id), 0, Method::Ticket)
            .await?;
        let code = records::code(&self.replica().view(), code_id)
            .ok_or_else(|| Reject::new(Code::NoSuchCode, [&code_id]))?;
        let key = self.unseal(Purpose::TicketKey, &code)?;
        let opening = (ProofMethod::Ticket, sha256(&ticket.csr), node_nonce, server_nonce);
        let transcript = self.transcript(source, code.id, device_id, opening)?;
        if !transcript.check_node_proof(&key, &ticket.proof) {
            let (counted, _) = self
                .count_attempt(source, device_id, Some(code_id), 0, Method::Ticket)
                .await?;
            self.fail_attempt(source, counted.attempt_id, code_id).await;
            return Err(Refusal::WrongTicket.into());
        }
        let prove = Prove {
            pairing_id: self.fresh_id(),
            attempt_id: None,
            code_id,
            device_id,
            device_name: ticket.device_name,
            csr_der: ticket.csr,
            csr_spki: spki,
            sas: transcript.sas(&key),
            source: source.address.clone(),
            served_by: self.replica_id(),
            fetch_token_hash: fetch_hash(&transcript, &key),
        };
        let proof = Proof {
            message,
            request_id: self.fresh_id(),
            prove,
            key,
            transcript,
        };
        self.prove(server_nonce, source, proof).await
    }

    /// The same message again, because its answer was lost: the same answer.
    async fn prove_again(
        &self,
        key: exchange::Key,
        source: &EnrolSource,
        message: [u8; 32],
        proof: Proof,
        is_nonce: bool,
    ) -> Result<ProofAccepted, Error> {
        if proof.message != message {
            return Err(exchange::unknown(is_nonce));
        }
        self.prove(key, source, proof).await
    }

    /// Commits a right proof and answers it.
    async fn prove(
        &self,
        key: exchange::Key,
        source: &EnrolSource,
        proof: Proof,
    ) -> Result<ProofAccepted, Error> {
        self.exchanges()
            .put(key, source, Stage::Proved(Box::new(proof.clone())))?;
        let sas = proof.prove.sas.clone();
        let written = self
            .propose(proof.request_id, self.as_replica(), proof.prove)
            .await?;
        let Reply::Proved(proved) = written.reply else {
            return Err(self.odd_reply("pairing.prove"));
        };
        let trust = self.trust_bundle()?;
        Ok(ProofAccepted {
            pairing_id: proved.pairing_id,
            sas,
            server_proof: proof.transcript.server_proof(&proof.key, &trust.digest()),
            trust,
            expires_at_ms: proved.expires_at,
        })
    }

    fn unseal(&self, purpose: Purpose, code: &CodeRecord) -> Result<Zeroizing<Vec<u8>>, Error> {
        let context = code.id.to_string();
        let opened = self.keys().kek.open(purpose, context.as_bytes(), &code.sealed);
        opened.map_err(|error| Error::Internal(format!("code {context}: {error}")))
    }

    fn transcript(
        &self,
        source: &EnrolSource,
        code_id: Id,
        device_id: Id,
        (method, csr_sha256, node_nonce, server_nonce): (ProofMethod, [u8; 32], [u8; 32], [u8; 32]),
    ) -> Result<Transcript, Error> {
        let (cluster_id, code_id, node_id) = (
            self.cluster_id().to_string(),
            code_id.to_string(),
            device_id.to_string(),
        );
        let opening = Opening {
            cluster_id: &cluster_id,
            method,
            code_id: &code_id,
            node_id: &node_id,
            server_end_point: source.end_point,
            csr_sha256,
            node_nonce,
            server_nonce,
        };
        Transcript::new(&opening).map_err(|error| Error::Internal(error.to_string()))
    }
}

fn random_32() -> [u8; 32] {
    let mut bytes = [0; 32];
    platform::fill_random(&mut bytes);
    bytes
}

fn check_length(field: &'static str, bytes: &[u8], length: usize) -> Result<(), Error> {
    if bytes.len() == length {
        return Ok(());
    }
    let cause = format!("{} bytes instead of {length}", bytes.len());
    Err(Error::invalid(
        field,
        cause,
        "send the message as the protocol library made it",
    ))
}

/// What the state machine would refuse after a proof that was right, when it is too late to mend.
fn check_device_name(name: &str) -> Result<(), Error> {
    if name.len() <= limits::NAME_MAX && !name.chars().any(char::is_control) {
        return Ok(());
    }
    let most = limits::NAME_MAX;
    Err(Error::invalid(
        "device_name",
        format!("{} bytes, or control characters in it", name.len()),
        format!("send at most {most} bytes on one line"),
    ))
}

fn malformed(field: &'static str, error: PinError) -> Error {
    match error {
        PinError::Malformed(_) | PinError::Form => Error::invalid(
            field,
            error.to_string(),
            "send the message as the protocol library made it",
        ),
        other => Error::Internal(other.to_string()),
    }
}

/// The CSR's key, after all checks of the CSR itself.
pub(crate) fn csr_key(csr: &[u8]) -> Result<Fingerprint, Error> {
    let key = keys::check_csr(csr).map_err(|error| {
        Error::invalid(
            "csr",
            error.to_string(),
            "send a P-256 CSR in DER form, self-signed",
        )
    })?;
    Ok(Fingerprint::from_bytes(key.spki_sha256))
}

fn fetch_hash(transcript: &Transcript, key: &[u8]) -> Digest {
    let token = transcript.fetch_token(key);
    Digest::from_bytes(transcript::fetch_token_hash(token.as_slice()))
}

/// One digest over several fields, none of which can run into the next.
fn digest_of(fields: &[&[u8]]) -> [u8; 32] {
    let mut all = Vec::new();
    for field in fields {
        all.extend_from_slice(&sha256(field));
    }
    sha256(&all)
}

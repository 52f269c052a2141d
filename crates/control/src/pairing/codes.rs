//! Codes: PINs and tickets, minted, listed, taken back.
//!
//! What never lives here: a PIN or ticket after it was answered. The state holds only what checks a proof,
//! sealed.

use palyra_pki::seal::Purpose;
use palyra_pki::{Pin, Ticket, pin, ticket};
use palyra_platform as platform;
use palyra_state::pairing::{self as records, Code, CodeStatus, Method, MintCode, RevokeCode};
use palyra_state::{Id, Reply};
use zeroize::Zeroizing;

use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, Written};
use crate::error::{Error, Refusal};
use crate::selector;

/// What an operator asks for when minting.
#[derive(Debug, Clone, Default)]
pub struct Mint {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// Life in milliseconds, 30 s to 24 h; 0: ten minutes.
    pub ttl_ms: u64,
    /// Name for the device; may be empty.
    pub device_name: String,
}

/// A fresh code. The secret is shown once.
#[derive(Debug)]
pub struct Minted {
    /// The PIN in two groups, or the ticket's text.
    pub secret: Zeroizing<String>,
    /// The code without its secret.
    pub code: CodeView,
    /// The entry.
    pub write: WriteInfo,
}

/// A code as operators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct CodeView {
    /// The record. Its sealed blob is left out.
    pub record: Code,
    /// Where it stands by this replica's clock.
    pub status: CodeStatus,
}

impl Control {
    /// Mints an eight-digit PIN.
    ///
    /// # Errors
    /// What the state machine refuses; [`Refusal::ShownOnce`] when the request id made a code before;
    /// [`Error::Busy`] when too many are being made: each takes tens of milliseconds of one core.
    pub async fn mint_pin(&self, caller: &Caller, mint: Mint) -> Result<Minted, Error> {
        let code_id = self.fresh_id();
        let pin = Pin::generate(&mut platform::fill_random);
        let sealed = self.seal_pin(&pin, code_id).await?;
        self.mint(caller, mint, code_id, Method::Pin, sealed, pin.grouped())
            .await
    }

    async fn seal_pin(&self, pin: &Pin, code_id: Id) -> Result<Vec<u8>, Error> {
        let _slot = self.minting().try_acquire().map_err(|_| Error::Busy {
            what: "PINs in the making",
        })?;
        let (pin, kek, id) = (pin.clone(), self.keys().kek.clone(), code_id.to_string());
        let made = platform::blocking(move || {
            let verifier =
                pin::mint(&pin, &id, &mut platform::fill_random).map_err(|error| error.to_string())?;
            kek.seal(
                Purpose::PinVerifier,
                id.as_bytes(),
                verifier.to_bytes(),
                &mut platform::fill_random,
            )
            .map_err(|error| error.to_string())
        });
        made.await.map_err(Error::Internal)
    }

    /// Mints a ticket, a 128-bit secret for machines.
    ///
    /// # Errors
    /// As [`Control::mint_pin`].
    pub async fn mint_ticket(&self, caller: &Caller, mint: Mint) -> Result<Minted, Error> {
        let code_id = self.fresh_id();
        let ticket = Ticket {
            cluster_id: self.cluster_id().to_string(),
            id: code_id.to_string(),
            secret: ticket::Secret::generate(&mut platform::fill_random),
            root_pin: self.root_pin()?,
            endpoints: self.enrol_endpoints(),
        };
        let text = ticket
            .to_text()
            .map_err(|error| Error::Internal(format!("ticket: {error}")))?;
        let sealed = self
            .keys()
            .kek
            .seal(
                Purpose::TicketKey,
                ticket.id.as_bytes(),
                ticket.key().as_slice(),
                &mut platform::fill_random,
            )
            .map_err(|error| Error::Internal(error.to_string()))?;
        self.mint(caller, mint, code_id, Method::Ticket, sealed, text)
            .await
    }

    async fn mint(
        &self,
        caller: &Caller,
        mint: Mint,
        code_id: Id,
        method: Method,
        sealed: Vec<u8>,
        secret: Zeroizing<String>,
    ) -> Result<Minted, Error> {
        let request_id = self.request_id(&mint.request_id)?;
        let command = MintCode {
            code_id,
            method: method as i32,
            sealed: sealed.into(),
            ttl_ms: mint.ttl_ms,
            device_name: mint.device_name,
        };
        let written: Written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::CodeMinted(minted) = written.reply else {
            return Err(self.odd_reply("pairing.mint_code"));
        };
        if minted.code_id != code_id {
            let what = format!("pairing code C{}", minted.number);
            return Err(Refusal::ShownOnce { what }.into());
        }
        self.applied(written.receipt).await?;
        let code = self.code_view(code_id)?;
        Ok(Minted {
            secret,
            code,
            write: written.info,
        })
    }

    fn code_view(&self, code_id: Id) -> Result<CodeView, Error> {
        let state = self.replica().view();
        let record = records::code(&state, code_id)
            .ok_or_else(|| Error::Internal(format!("code {code_id} is not where it was written")))?;
        Ok(view(record, self.now_ms(&state)))
    }

    /// The codes, newest last; only the open ones unless `all`.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn list_codes(&self, read: ReadOptions, all: bool) -> Result<(Vec<CodeView>, ReadInfo), Error> {
        let (state, info) = self.read(read).await?;
        let now = self.now_ms(&state);
        let mut found: Vec<CodeView> = records::codes(&state)
            .into_iter()
            .map(|code| view(code, now))
            .collect();
        found.retain(|code| all || code.status == CodeStatus::Open);
        Ok((found, info))
    }

    /// Takes an open code back.
    ///
    /// # Errors
    /// What the state machine refuses: there is none, or it is not open any more.
    pub async fn revoke_code(
        &self,
        caller: &Caller,
        request_id: &str,
        code: &str,
        reason: &str,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let code_id = selector::code(&self.replica().view(), code)?;
        let command = RevokeCode {
            code_id,
            reason: reason.to_owned(),
        };
        Ok(self.propose(request_id, caller.actor(), command).await?.info)
    }
}

fn view(mut record: Code, now: u64) -> CodeView {
    record.sealed = bytes::Bytes::new();
    CodeView {
        status: records::code_status(&record, now),
        record,
    }
}

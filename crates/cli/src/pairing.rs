//! `palyra pairing`: codes and tickets, and the machines that ask to be let in.

mod view;

use clap::{Args, Subcommand};
use palyra_client::{Class, Client};
use palyra_proto::pairing::v1::{
    ApproveRequest, GetRequestRequest, ListCodesRequest, ListRequestsRequest, MintPinRequest,
    MintTicketRequest, RejectRequest, RevokeCodeRequest,
};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::time::{millis, parse_limit};
use crate::output::{Format, Out, Record, Source, interactive, note, table};
use crate::pages::{ALL, Limit};
use crate::session::{Global, Session, required_reason};
use crate::watch::watch;
use view::{CodeView, Entry, MintedPin, MintedTicket, RequestView, digits_of};

pub(crate) use view::grouped;

/// The state of a request that an operator has to decide.
const PENDING: &str = "pending_approval";

/// What can be done about pairing.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Makes a code of eight digits, to be typed on one machine
    #[command(after_help = "Example:\n  palyra pairing code\n  palyra pairing code --ttl 1h --name web-1")]
    Code(Mint),
    /// Makes a ticket, as text and as a picture to be scanned, for one machine
    #[command(after_help = "Example:\n  palyra pairing ticket --name web-1\n  palyra pairing ticket -o json")]
    Ticket(Mint),
    /// Lists open codes and the requests of machines
    #[command(after_help = "Example:\n  palyra pairing ls\n  palyra pairing ls --status pending_approval -w")]
    Ls(List),
    /// Shows one request: the check digits, the key, where it came from
    #[command(after_help = "Example:\n  palyra pairing show 01J9ZK")]
    Show {
        /// Pairing id, device id, the beginning of one, or the name of a machine that waits
        id: String,
    },
    /// Lets a machine in; compare the check digits first
    #[command(
        after_help = "Example:\n  palyra pairing approve 01J9ZK --sas 123456 --reason \"rack 4, compared\""
    )]
    Approve(Approve),
    /// Turns a machine away
    #[command(after_help = "Example:\n  palyra pairing reject 01J9ZK --reason \"nobody expects it\"")]
    Reject {
        /// Pairing id, device id, the beginning of one, or the name of a machine that waits
        id: String,
        /// Why; kept in the journal and told to the machine
        #[arg(long)]
        reason: String,
    },
    /// Revokes a code or ticket that is not used yet
    #[command(after_help = "Example:\n  palyra pairing revoke C3 --reason \"read out in public\"")]
    Revoke {
        /// Number (C3 or 3) or id of the code
        code: String,
        /// Why; kept in the journal
        #[arg(long, default_value = "")]
        reason: String,
    },
}

/// What a code or ticket is made for.
#[derive(Debug, Args)]
pub(crate) struct Mint {
    /// How long it is good: 30s to 24h; without it ten minutes
    #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
    ttl: Option<std::time::Duration>,
    /// What the machine will be called
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
}

impl Mint {
    fn ttl_ms(&self) -> u64 {
        self.ttl.map_or(0, millis)
    }
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only requests of this status: pending_approval, approved, rejected, completed, expired; and no codes
    #[arg(long, value_name = "STATUS", default_value = "", hide_default_value = true)]
    status: String,
    /// Also codes that are used, burned, expired or revoked
    #[arg(long)]
    all: bool,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// How a machine is let in.
#[derive(Debug, Args)]
pub(crate) struct Approve {
    /// Pairing id, device id, the beginning of one, or the name of a machine that waits
    id: String,
    /// The six check digits on the machine's screen: refused unless they are the same here
    #[arg(long, default_value = "", hide_default_value = true)]
    sas: String,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Do not ask whether the digits are the same
    #[arg(short, long)]
    yes: bool,
}

/// Does what was asked about pairing.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Code(mint) => code(global, &session, mint).await?,
        Verb::Ticket(mint) => ticket(global, &session, mint).await?,
        Verb::Ls(list) => ls(client, out, list).await?,
        Verb::Show { id } => show(client, out, id).await?,
        Verb::Approve(approval) => approve(global, client, approval).await?,
        Verb::Reject { id, reason } => {
            required_reason(&reason)?;
            let id = request(client, id).await?.id;
            let again = again(format!("palyra pairing reject {id} --reason \"...\""));
            let request_id = global.request_id();
            let request = RejectRequest {
                request_id,
                id,
                reason,
            };
            let answer = client.reject(request).await;
            let answer = answer.map_err(|error| Failure::from(error).look_again(again))?;
            let view = RequestView::from(answer.request.unwrap_or_default());
            out.one(
                &view,
                answer.write.into(),
                &[("rejected", view.id.clone()), ("device", view.device_id.clone())],
            )?;
        }
        Verb::Revoke { code, reason } => {
            let request = RevokeCodeRequest {
                request_id: global.request_id(),
                code: number(&code),
                reason,
            };
            let answer = client.revoke_code(request).await?;
            out.one(
                &Revoked { revoked: &code },
                answer.write.into(),
                &[("revoked", code.clone())],
            )?;
        }
    }
    session.close().await;
    Ok(())
}

#[derive(Serialize)]
struct Revoked<'a> {
    revoked: &'a str,
}

/// `C3` is what people read; the number is what the server takes.
fn number(code: &str) -> String {
    match code.strip_prefix(['C', 'c']) {
        Some(digits) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            digits.to_owned()
        }
        _ => code.to_owned(),
    }
}

/// A secret is shown once; the answer to a repeated request does not hold it.
fn lost_secret(what: &str, number: u32) -> Failure {
    let message =
        format!("the {what} was made, but the answer that held it was lost; it cannot be shown again");
    let next = format!("palyra pairing revoke C{number} --reason \"answer lost\", and make another");
    Failure::local(Class::Unknown, message, next)
}

async fn code(global: &Global, session: &Session, mint: Mint) -> Result {
    let ttl_ms = mint.ttl_ms();
    let request = MintPinRequest {
        request_id: global.request_id(),
        ttl_ms,
        device_name: mint.name,
    };
    let answer = session.client.mint_pin(request).await?;
    let view = CodeView::from(answer.code.unwrap_or_default());
    if answer.pin.is_empty() {
        return Err(lost_secret("code", view.number));
    }
    let minted = MintedPin {
        // However the server groups them: digits are what is typed and what scripts pass on.
        pin: digits_of(&answer.pin),
        code: view,
    };
    let enrol = enrol_endpoints(&session.client).await;
    let facts = [
        ("PIN", grouped(&minted.pin)),
        ("code", format!("C{}", minted.code.number)),
        ("expires", minted.code.expires_at.told(palyra_client::wall_ms())),
        (
            "next",
            format!(
                "on the machine: palyra node pair --pin {} --code C{} --enrol {enrol}",
                minted.pin, minted.code.number
            ),
        ),
        (
            "then",
            "palyra pairing ls, compare the check digits, and: palyra pairing approve ID --sas DIGITS"
                .to_owned(),
        ),
    ];
    global.out().one(&minted, answer.write.into(), &facts)
}

async fn ticket(global: &Global, session: &Session, mint: Mint) -> Result {
    let ttl_ms = mint.ttl_ms();
    let request = MintTicketRequest {
        request_id: global.request_id(),
        ttl_ms,
        device_name: mint.name,
    };
    let answer = session.client.mint_ticket(request).await?;
    let view = CodeView::from(answer.code.unwrap_or_default());
    if answer.ticket.is_empty() {
        return Err(lost_secret("ticket", view.number));
    }
    let minted = MintedTicket {
        ticket: answer.ticket,
        code: view,
    };
    let out = global.out();
    if out.format.is_table() {
        match draw(&minted.ticket) {
            Some(picture) => out.write(&picture)?,
            None => note("the ticket is too long for a picture; use the text"),
        }
    }
    let facts = [
        ("ticket", minted.ticket.clone()),
        ("code", format!("C{}", minted.code.number)),
        ("expires", minted.code.expires_at.told(palyra_client::wall_ms())),
        (
            "next",
            "on the machine: palyra node pair --ticket TICKET".to_owned(),
        ),
        (
            "then",
            "palyra pairing ls, compare the check digits, and: palyra pairing approve ID --sas DIGITS"
                .to_owned(),
        ),
    ];
    out.one(&minted, answer.write.into(), &facts)
}

/// The text as a QR code in half blocks. Light on dark: most terminals are dark, and scanners take both.
fn draw(text: &str) -> Option<String> {
    use qrcode::render::unicode::Dense1x2;
    let code = qrcode::QrCode::with_error_correction_level(text, qrcode::EcLevel::L).ok()?;
    let picture = code
        .render::<Dense1x2>()
        .dark_color(Dense1x2::Light)
        .light_color(Dense1x2::Dark)
        .build();
    Some(picture + "\n")
}

/// Where machines enrol, for the command that a person will type. A placeholder when the cluster does not
/// say.
async fn enrol_endpoints(client: &Client) -> String {
    let status = client
        .clone()
        .with_timeout(std::time::Duration::from_secs(2))
        .status()
        .await;
    let live = status.map(|status| status.replicas).unwrap_or_default();
    let live = live
        .into_iter()
        .filter(|replica| replica.status != "removed" && !replica.enrol_addr.is_empty());
    let list: Vec<String> = live.map(|replica| replica.enrol_addr).collect();
    if list.is_empty() {
        "HOST:7442".to_owned()
    } else {
        list.join(",")
    }
}

async fn requests(client: &Client, list: &List, limit: Limit) -> Result<(Vec<RequestView>, Source)> {
    limit
        .newest(async |page| {
            let request = ListRequestsRequest {
                status: list.status.clone(),
                page: Some(page),
                ..ListRequestsRequest::default()
            };
            let answer = client.list_requests(request).await?;
            let items = answer.requests.into_iter().map(RequestView::from).collect();
            Ok((items, answer.page, answer.read.into()))
        })
        .await
}

async fn codes(client: &Client, list: &List) -> Result<Vec<CodeView>> {
    let request = ListCodesRequest {
        all: list.all,
        ..ListCodesRequest::default()
    };
    let answer = client.list_codes(request).await?;
    Ok(answer.codes.into_iter().map(CodeView::from).collect())
}

/// Codes, unless requests of one status are asked for, and requests. The source is the older one.
async fn entries(client: &Client, list: &List, limit: Limit) -> Result<(Vec<Entry>, Source)> {
    let (requests, source) = requests(client, list, limit).await?;
    let mut entries = Vec::new();
    if list.status.is_empty() {
        entries.extend(codes(client, list).await?.into_iter().map(Entry::Code));
    }
    entries.extend(requests.into_iter().map(Entry::Request));
    Ok((entries, source))
}

async fn ls(client: &Client, out: Out, list: List) -> Result {
    if list.watch {
        let fetch = async |client: Client| entries(&client, &list, ALL).await;
        return watch(client, out, list.limit.count(), fetch).await;
    }
    if out.format == Format::Jsonl {
        let (items, source) = entries(client, &list, list.limit).await?;
        return out.list(&items, source);
    }
    let (items, source) = requests(client, &list, list.limit).await?;
    if !list.status.is_empty() {
        return out.list(&items, source);
    }
    let codes = codes(client, &list).await?;
    let both = Both {
        items: &items,
        codes: &codes,
        source,
    };
    if !out.format.is_table() {
        return out.plain(&both, "");
    }
    if !codes.is_empty() {
        out.list(&codes, source)?;
        out.write("\n")?;
    }
    out.list(&items, source)?;
    if let Some(first) = items.iter().find(|item| item.status == PENDING) {
        note(&format!(
            "compare the check digits, then: palyra pairing approve {} --sas {}",
            first.id, first.sas
        ));
    }
    Ok(())
}

#[derive(Serialize)]
struct Both<'a> {
    items: &'a [RequestView],
    codes: &'a [CodeView],
    #[serde(flatten)]
    source: Source,
}

async fn show(client: &Client, out: Out, id: String) -> Result {
    let answer = client.get_request(named(id)).await?;
    let view = RequestView::from(answer.request.unwrap_or_default());
    out.one(&view, answer.read.into(), &view.facts())
}

fn named(id: String) -> GetRequestRequest {
    GetRequestRequest {
        id,
        ..GetRequestRequest::default()
    }
}

/// The request that a person means. A name means a machine only while that waits, so a decision goes by the
/// request's own id: sent again after a lost answer, it still finds what it has decided.
async fn request(client: &Client, id: String) -> Result<RequestView> {
    let answer = client.get_request(named(id)).await?;
    Ok(RequestView::from(answer.request.unwrap_or_default()))
}

/// What to type when the outcome of `command` is not known.
fn again(command: String) -> impl FnOnce(&str) -> String {
    move |request_id| format!("{command} --request-id {request_id}: it is answered, not repeated")
}

async fn approve(global: &Global, client: &Client, approval: Approve) -> Result {
    let sas = digits(&approval.sas)?;
    let view = request(client, approval.id).await?;
    if sas.is_empty() && !approval.yes && interactive() && view.status == PENDING {
        note(&table::facts(&view.facts()));
        confirm(&view)?;
    }
    let again = again(format!("palyra pairing approve {} --sas {}", view.id, view.sas));
    let request = ApproveRequest {
        request_id: global.request_id(),
        id: view.id,
        sas,
        reason: approval.reason,
    };
    let answer = client.approve(request).await;
    let answer = answer.map_err(|error| Failure::from(error).look_again(again))?;
    let view = RequestView::from(answer.request.unwrap_or_default());
    let facts = [
        ("approved", view.key()),
        ("device", view.device_id.clone()),
        ("name", view.device_name.clone()),
        ("certificate", view.certificate_fingerprint.clone()),
        ("next", "palyra node ls".to_owned()),
    ];
    global.out().one(&view, answer.write.into(), &facts)
}

/// Check digits however a person typed them; empty when none were given.
pub(crate) fn digits(typed: &str) -> Result<String> {
    let digits = digits_of(typed);
    if digits.is_empty() && !typed.is_empty() {
        return Err(Failure::usage(
            format!("{typed:?} are no check digits"),
            "give six: --sas 123456",
        ));
    }
    Ok(digits)
}

/// Shows a person the request that an approval is about, and asks whether the machine shows the same digits.
pub(crate) async fn compare(client: &Client, id: String) -> Result {
    let view = request(client, id).await?;
    note(&table::facts(&view.facts()));
    confirm(&view)
}

fn confirm(view: &RequestView) -> Result {
    use std::io::Write;
    let mut stderr = std::io::stderr();
    let question = format!("Does the machine's screen show {}? [y/N] ", view.digits());
    stderr.write_all(question.as_bytes())?;
    stderr.flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if matches!(line.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    let next = format!(
        "if the digits differ, somebody is in between: palyra pairing reject {} --reason \"digits differ\"",
        view.id
    );
    Err(Failure::local(Class::Precondition, "nothing was approved", next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_named_as_people_read_them() {
        assert_eq!(number("C3"), "3");
        assert_eq!(number("c12"), "12");
        assert_eq!(number("7"), "7");
        assert_eq!(number("01ARZ3NDEKTSV4RRFFQ69G5FAV"), "01ARZ3NDEKTSV4RRFFQ69G5FAV");
        assert_eq!(number("CAFE"), "CAFE");
    }

    #[test]
    fn a_ticket_becomes_a_picture_of_half_blocks() {
        let picture = draw(&format!("palyra-ticket.{}", "A".repeat(200))).unwrap();
        let widths: std::collections::BTreeSet<usize> =
            picture.lines().map(|line| line.chars().count()).collect();
        assert_eq!(widths.len(), 1, "every line is as wide");
        assert!(picture.chars().all(|c| matches!(c, '█' | '▀' | '▄' | ' ' | '\n')));
        assert!(draw(&"A".repeat(5_000)).is_none());
    }
}

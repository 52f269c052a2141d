//! Codes and pairing requests as they are printed.

use palyra_client::wall_ms;
use palyra_proto::pairing::v1::{CodeInfo, RequestInfo};
use serde::Serialize;

use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::Moment;

/// The digits alone, however they come grouped: what is typed, and what scripts pass on.
pub(crate) fn digits_of(text: &str) -> String {
    text.chars().filter(char::is_ascii_digit).collect()
}

/// Digits in two groups, as people read them out.
pub(crate) fn grouped(digits: &str) -> String {
    match digits.split_at_checked(digits.len() / 2) {
        Some((first, second)) if !first.is_empty() => format!("{first} {second}"),
        _ => digits.to_owned(),
    }
}

/// A pairing code or ticket.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CodeView {
    code_id: String,
    pub(crate) number: u32,
    method: String,
    status: String,
    device_name: String,
    attempts: u32,
    issued_by: String,
    created_at: Moment,
    pub(crate) expires_at: Moment,
}

impl From<CodeInfo> for CodeView {
    fn from(info: CodeInfo) -> CodeView {
        CodeView {
            code_id: info.id,
            number: info.number,
            method: info.method,
            status: info.status,
            device_name: info.device_name,
            attempts: info.attempts,
            issued_by: info.issued_by,
            created_at: Moment(info.created_at_ms),
            expires_at: Moment(info.expires_at_ms),
        }
    }
}

impl Record for CodeView {
    const COLUMNS: &'static [Column] = &[
        column("CODE"),
        column("METHOD"),
        column("STATUS"),
        text("FOR"),
        column("ATTEMPTS"),
        column("EXPIRES"),
        text("ISSUED BY"),
        wide("CREATED"),
        wide("ID"),
    ];

    fn key(&self) -> String {
        self.code_id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            format!("C{}", self.number),
            self.method.clone(),
            self.status.clone(),
            self.device_name.clone(),
            self.attempts.to_string(),
            self.expires_at.told(now_ms),
            self.issued_by.clone(),
            self.created_at.told(now_ms),
            self.code_id.clone(),
        ]
    }
}

/// A code or a request, where both stand in one list.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Entry {
    Code(CodeView),
    Request(RequestView),
}

impl Record for Entry {
    const COLUMNS: &'static [Column] = &[
        column("REQUEST OR CODE"),
        text("NAME"),
        column("STATUS"),
        column("CHECK"),
        text("FROM"),
        column("SINCE"),
        column("EXPIRES"),
        wide("DEVICE"),
        wide("METHOD"),
        wide("ATTEMPTS"),
    ];

    fn key(&self) -> String {
        match self {
            Entry::Code(code) => code.key(),
            Entry::Request(request) => request.key(),
        }
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        match self {
            Entry::Code(code) => vec![
                format!("C{}", code.number),
                code.device_name.clone(),
                code.status.clone(),
                String::new(),
                code.issued_by.clone(),
                code.created_at.told(now_ms),
                code.expires_at.told(now_ms),
                String::new(),
                code.method.clone(),
                code.attempts.to_string(),
            ],
            Entry::Request(request) => vec![
                request.id.clone(),
                request.device_name.clone(),
                request.status.clone(),
                request.digits(),
                request.source.clone(),
                request.created_at.told(now_ms),
                request.expires_at.told(now_ms),
                request.device_id.clone(),
                request.method.clone(),
                String::new(),
            ],
        }
    }
}

/// A fresh code with its digits.
#[derive(Serialize)]
pub(crate) struct MintedPin {
    pub(crate) pin: String,
    #[serde(flatten)]
    pub(crate) code: CodeView,
}

/// A fresh ticket with its text.
#[derive(Serialize)]
pub(crate) struct MintedTicket {
    pub(crate) ticket: String,
    #[serde(flatten)]
    pub(crate) code: CodeView,
}

/// A machine that asks to be let in, or asked once.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RequestView {
    pub(crate) id: String,
    pub(crate) device_id: String,
    pub(crate) device_name: String,
    pub(crate) status: String,
    pub(crate) sas: String,
    key_fingerprint: String,
    source: String,
    method: String,
    code_id: String,
    proved_at_replica: u64,
    created_at: Moment,
    expires_at: Moment,
    decided_by: String,
    decided_at: Moment,
    reason: String,
    pub(crate) certificate_fingerprint: String,
    replaces_device: bool,
}

impl From<RequestInfo> for RequestView {
    fn from(info: RequestInfo) -> RequestView {
        RequestView {
            id: info.id,
            device_id: info.device_id,
            device_name: info.device_name,
            status: info.status,
            sas: digits_of(&info.sas),
            key_fingerprint: info.key_fingerprint,
            source: info.source,
            method: info.method,
            code_id: info.code_id,
            proved_at_replica: info.served_by,
            created_at: Moment(info.created_at_ms),
            expires_at: Moment(info.expires_at_ms),
            decided_by: info.decided_by,
            decided_at: Moment(info.decided_at_ms),
            reason: info.reason,
            certificate_fingerprint: info.certificate_fingerprint,
            replaces_device: info.replaces_device,
        }
    }
}

impl RequestView {
    /// The check digits as both screens show them.
    pub(crate) fn digits(&self) -> String {
        grouped(&self.sas)
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let decided = if self.decided_by.is_empty() {
            String::new()
        } else {
            format!("{} by {}", self.decided_at.told(now), self.decided_by)
        };
        let warning = if self.replaces_device {
            "a device with this id exists; who approves this takes its certificates from it".to_owned()
        } else {
            String::new()
        };
        vec![
            ("request", self.id.clone()),
            ("status", self.status.clone()),
            ("WARNING", warning),
            ("device", self.device_id.clone()),
            ("name", self.device_name.clone()),
            ("check digits", self.digits()),
            ("key", self.key_fingerprint.clone()),
            ("source", self.source.clone()),
            (
                "method",
                format!("{}, proved at replica {}", self.method, self.proved_at_replica),
            ),
            ("asked", self.created_at.told(now)),
            ("expires", self.expires_at.told(now)),
            ("decided", decided),
            ("reason", self.reason.clone()),
            ("certificate", self.certificate_fingerprint.clone()),
        ]
    }
}

impl Record for RequestView {
    const COLUMNS: &'static [Column] = &[
        column("REQUEST"),
        text("NAME"),
        column("STATUS"),
        column("CHECK"),
        column("SOURCE"),
        column("ASKED"),
        wide("DEVICE"),
        wide("METHOD"),
        wide("KEY"),
        wide("DECIDED BY"),
        wide("REASON"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.id.clone(),
            self.device_name.clone(),
            self.status.clone(),
            self.digits(),
            self.source.clone(),
            self.created_at.told(now_ms),
            self.device_id.clone(),
            self.method.clone(),
            self.key_fingerprint.chars().take(16).collect(),
            self.decided_by.clone(),
            self.reason.clone(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_for_people_only() {
        assert_eq!(digits_of("097 546"), "097546");
        assert_eq!(grouped("097546"), "097 546");
        assert_eq!(grouped("12345678"), "1234 5678");
        assert_eq!(grouped(""), "");
        let view = RequestView::from(RequestInfo {
            sas: "097 546".to_owned(),
            ..RequestInfo::default()
        });
        assert_eq!((view.sas.as_str(), view.digits().as_str()), ("097546", "097 546"));
        let entry = serde_json::to_value(Entry::Request(view)).unwrap();
        assert_eq!(
            (&entry["kind"], &entry["sas"]),
            (&"request".into(), &"097546".into())
        );
    }
}

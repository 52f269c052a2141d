//! Refusals: a closed list of stable codes, each with a class, a message and the next step.
//!
//! A refusal is kept with its request id as code and arguments, never as text: two versions that word a
//! message differently must still write the same bytes. `docs/errors/` has a page for each code, and a test
//! compares both.

mod texts;
mod words;

pub use texts::Code;

use std::fmt;

use crate::check::cut;
use crate::limits;

/// A deterministic refusal.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct Reject {
    /// Number of the code.
    #[prost(enumeration = "Code", tag = "1")]
    number: i32,
    /// What the message names, in order.
    #[prost(string, repeated, tag = "2")]
    pub args: Vec<String>,
}

/// What kind of refusal it is: the edges map this to gRPC statuses and exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// There is no such thing.
    NotFound,
    /// Somebody else was first, or it exists already.
    Conflict,
    /// Something else must be done or true first.
    Precondition,
    /// This actor may not.
    Denied,
    /// The request itself is wrong.
    Invalid,
    /// A limit is reached.
    Exhausted,
    /// Its time has passed.
    Expired,
}

impl Class {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Class::NotFound => "not_found",
            Class::Conflict => "conflict",
            Class::Precondition => "precondition",
            Class::Denied => "denied",
            Class::Invalid => "invalid",
            Class::Exhausted => "exhausted",
            Class::Expired => "expired",
        }
    }
}

impl Reject {
    /// A refusal that names `args`, each in at most `limits::REJECT_ARG` bytes and without control characters:
    /// what is refused for its length or its contents is remembered and printed nevertheless.
    #[must_use]
    pub fn new<const N: usize>(code: Code, args: [&dyn fmt::Display; N]) -> Reject {
        debug_assert_eq!(N, code.arguments(), "{code:?}");
        Reject {
            number: code as i32,
            args: args.iter().map(|arg| shown(&arg.to_string())).collect(),
        }
    }

    /// What was refused; [`Code::NoCluster`] when it is a code of a later version, which a leader that was updated
    /// first may answer.
    #[must_use]
    pub fn kind(&self) -> Code {
        self.number()
    }

    /// Stable code, `E0403`, also of a later version.
    #[must_use]
    pub fn code(&self) -> String {
        format!("E{:04}", self.number)
    }

    /// What kind of refusal it is.
    #[must_use]
    pub fn class(&self) -> Class {
        self.text().0
    }

    /// The thing and the cause.
    #[must_use]
    pub fn message(&self) -> String {
        self.fill(self.text().1)
    }

    /// What to do now, often a command.
    #[must_use]
    pub fn next(&self) -> String {
        self.fill(self.text().2)
    }

    fn text(&self) -> (Class, &'static str, &'static str) {
        match Code::try_from(self.number) {
            Ok(code) => code.text(),
            Err(_) => (
                Class::Precondition,
                "a replica of a later version refused it, for a reason that is not known here",
                "look the code up in that version's manual, or ask the replica that leads",
            ),
        }
    }

    fn fill(&self, template: &str) -> String {
        let mut text = String::with_capacity(template.len());
        // Braces stand around numbers only. One pass, for an argument may hold braces too.
        for (at, piece) in template.split(['{', '}']).enumerate() {
            let arg = piece.parse().ok().and_then(|number: usize| self.args.get(number));
            text.push_str(match arg {
                _ if at % 2 == 0 => piece,
                Some(arg) => arg,
                None => "…",
            });
        }
        text
    }
}

fn shown(arg: &str) -> String {
    let plain = |symbol: char| if symbol.is_control() { '\u{fffd}' } else { symbol };
    cut(
        arg.chars().take(limits::REJECT_ARG).map(plain).collect(),
        limits::REJECT_ARG,
    )
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.code(), self.message(), self.next())
    }
}

impl fmt::Debug for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reject({} {:?})", self.code(), self.args)
    }
}

impl std::error::Error for Reject {}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{:04}", *self as i32)
    }
}

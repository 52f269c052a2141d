//! What the owner of the machine lets the control plane run: capability files in TOML, read once at start.
//!
//! What never lives here: running anything (see `exec`), the built-in capabilities (see `builtin`).
//!
//! Invariants: a loaded capability has a name of the agreed form, a program that exists and is executable,
//! and every number within the limits below; unknown keys are refused, so that a typing error never widens
//! what is allowed.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use crate::{Error, Kind, Result};

/// The most capabilities on one node, built-in ones included.
pub const MAX_CAPABILITIES: usize = 64;
/// The longest name, in characters.
pub const MAX_NAME: usize = 63;
/// The longest description, in bytes.
pub const MAX_DESCRIPTION: usize = 256;
/// The longest timeout.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// The timeout of a capability that names none.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The most runs of one capability at a time.
pub const MAX_CONCURRENCY: u32 = 64;
/// The most dispatches that may wait for one capability.
pub const MAX_QUEUE: u32 = 1024;
/// The most attempts of one dispatch.
pub const MAX_ATTEMPTS: u32 = 100;
/// The longest wait before the second attempt.
const MAX_BACKOFF: Duration = Duration::from_secs(3600);
/// The wait before the second attempt when none is given.
const DEFAULT_BACKOFF: Duration = Duration::from_secs(1);
/// Between SIGTERM and SIGKILL when nothing is given, and at most: a cancel is answered within a minute.
const DEFAULT_GRACE: Duration = Duration::from_secs(2);
const MAX_GRACE: Duration = Duration::from_secs(30);
const MAX_RETRY_ON: usize = 16;
/// The largest answer that the control plane takes, in bytes; also the default of `max_output`.
pub const MAX_OUTPUT: usize = 512 * 1024;
/// The largest capability file, in bytes.
const MAX_FILE: u64 = 256 * 1024;
const MAX_ARGS: usize = 64;
const MAX_ENV: usize = 64;

/// What a second run of the same dispatch would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// Nothing new: it may be run again after a lost session.
    Idempotent,
    /// Something that must not happen twice.
    Once,
}

impl Effect {
    /// The word on the wire: `idempotent` or `once`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idempotent => "idempotent",
            Self::Once => "once",
        }
    }
}

/// What runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Inside the agent.
    Builtin(Builtin),
    /// A program of the owner's.
    Program(Program),
}

/// The capabilities that every node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builtin {
    /// Answers what it was sent.
    Echo,
    /// Load, memory, disk and uptime.
    SystemHealth,
    /// Who this node is and which replica it is connected to.
    SystemIdentity,
}

/// How to run a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Absolute path.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Absolute path of its working folder; the data folder when absent.
    pub working_dir: Option<PathBuf>,
    /// Names of the environment variables that it gets from the agent's environment.
    pub env: Vec<String>,
}

/// How the control plane tries a capability again that may be run again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all; 0: one, save that what its session lost moves to the next one.
    pub attempts: u32,
    /// Before the second attempt; doubles with each further one.
    pub backoff: Duration,
    /// After what: error codes, `session_lost`, or `failed` for any failure; empty: what may pass by itself.
    pub on: Vec<String>,
}

/// One thing that this node does when it is asked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// 1 to [`MAX_NAME`] of `a-z 0-9 . _ -`, beginning with a letter.
    pub name: String,
    /// For people.
    pub description: String,
    /// What a second run would do.
    pub effect: Effect,
    /// The longest that it may run.
    pub timeout: Duration,
    /// How many may run at a time.
    pub concurrency: u32,
    /// How many dispatches may wait for it; 0: as many as for the node.
    pub queue_limit: u32,
    /// Whether, and how, it is tried again.
    pub retry: Retry,
    /// Between SIGTERM and SIGKILL when a run is ended.
    pub grace: Duration,
    /// Whether the person at the machine is asked before each run.
    pub local_mediation: bool,
    /// The largest answer, in bytes.
    pub max_output: usize,
    /// What runs.
    pub action: Action,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    capability: Vec<Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    program: PathBuf,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    description: String,
    effect: Effect,
    timeout: Option<String>,
    concurrency: Option<u32>,
    working_dir: Option<PathBuf>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    local_mediation: bool,
    max_output: Option<usize>,
    queue_limit: Option<u32>,
    attempts: Option<u32>,
    backoff: Option<String>,
    retry_on: Option<Vec<String>>,
    grace: Option<String>,
}

/// The capabilities that every node offers.
pub fn builtins() -> Vec<Capability> {
    let make = |name: &str, description: &str, builtin| Capability {
        name: name.to_owned(),
        description: description.to_owned(),
        effect: Effect::Idempotent,
        timeout: Duration::from_secs(10),
        concurrency: 16,
        queue_limit: 0,
        retry: Retry::default(),
        grace: DEFAULT_GRACE,
        local_mediation: false,
        max_output: MAX_OUTPUT,
        action: Action::Builtin(builtin),
    };
    vec![
        make("echo", "answers what it was sent", Builtin::Echo),
        make(
            "system.health",
            "load, memory, disk and uptime of the machine",
            Builtin::SystemHealth,
        ),
        make(
            "system.identity",
            "who this node is and which replica serves it",
            Builtin::SystemIdentity,
        ),
    ]
}

/// Reads capability files, in order, after the built-in ones. Relative programs and working folders are
/// relative to their file; a bare program name is looked up in `PATH`.
///
/// Errors name the file and the line: no such file, no TOML, an unknown key, a name that is taken or
/// malformed, a number outside its limit, a program that isn't there or not executable.
pub fn load(files: &[PathBuf]) -> Result<Vec<Capability>> {
    let mut all = builtins();
    let mut names: BTreeSet<String> = all.iter().map(|capability| capability.name.clone()).collect();
    for path in files {
        let text = read(path)?;
        let parsed: File = toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(&text, span.start));
            invalid(path, line, error.message())
        })?;
        for entry in parsed.capability {
            let line = line_of(&text, entry.span().start);
            let capability = check(entry.into_inner(), path).map_err(|why| invalid(path, line, &why))?;
            if !names.insert(capability.name.clone()) {
                return Err(invalid(
                    path,
                    line,
                    &format!("the capability {:?} exists already", capability.name),
                ));
            }
            all.push(capability);
            if all.len() > MAX_CAPABILITIES {
                return Err(invalid(
                    path,
                    line,
                    &format!("more than {MAX_CAPABILITIES} capabilities on one node"),
                ));
            }
        }
    }
    Ok(all)
}

fn read(path: &Path) -> Result<String> {
    let meta = std::fs::metadata(path).map_err(|error| {
        let next = "correct `capabilities` in node.toml, or the --capabilities option";
        Error::new(
            Kind::Usage,
            "N0301",
            format!("cannot read capability file {}: {error}", path.display()),
            next,
        )
    })?;
    if meta.len() > MAX_FILE {
        return Err(invalid(
            path,
            1,
            &format!(
                "the file has {} bytes, more than the {MAX_FILE} allowed",
                meta.len()
            ),
        ));
    }
    std::fs::read_to_string(path).map_err(|error| Error::io("read", path, &error))
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()
        .iter()
        .take(offset)
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

fn invalid(path: &Path, line: usize, why: &str) -> Error {
    let message = format!("{}:{line}: {}", path.display(), why.trim());
    Error::new(
        Kind::Usage,
        "N0302",
        message,
        "correct the file, then: palyra node restart",
    )
}

fn check(entry: Entry, file: &Path) -> std::result::Result<Capability, String> {
    check_name(&entry.name)?;
    check_texts(&entry)?;
    let timeout = entry
        .timeout
        .as_deref()
        .map_or(Ok(DEFAULT_TIMEOUT), parse_duration)?;
    if timeout.is_zero() || timeout > MAX_TIMEOUT {
        return Err("`timeout` must be between 1ms and 24h".to_owned());
    }
    let concurrency = entry.concurrency.unwrap_or(1);
    if !(1..=MAX_CONCURRENCY).contains(&concurrency) {
        return Err(format!("`concurrency` must be between 1 and {MAX_CONCURRENCY}"));
    }
    let queue_limit = entry.queue_limit.unwrap_or_default();
    if entry.queue_limit == Some(0) || queue_limit > MAX_QUEUE {
        return Err(format!("`queue_limit` must be between 1 and {MAX_QUEUE}"));
    }
    let retry = check_retry(&entry)?;
    let grace = entry.grace.as_deref().map_or(Ok(DEFAULT_GRACE), parse_duration)?;
    if grace > MAX_GRACE {
        return Err("`grace` must be at most 30s".to_owned());
    }
    let max_output = entry.max_output.unwrap_or(MAX_OUTPUT);
    if !(1..=MAX_OUTPUT).contains(&max_output) {
        return Err(format!("`max_output` must be between 1 and {MAX_OUTPUT} bytes"));
    }
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let path = find_program(&entry.program, folder)?;
    let working_dir = entry
        .working_dir
        .map(|dir| find_folder(&dir, folder))
        .transpose()?;
    Ok(Capability {
        name: entry.name,
        description: entry.description,
        effect: entry.effect,
        timeout,
        concurrency,
        queue_limit,
        retry,
        grace,
        local_mediation: entry.local_mediation,
        max_output,
        action: Action::Program(Program {
            path,
            args: entry.args,
            working_dir,
            env: entry.env,
        }),
    })
}

/// What is shown to people, and what is handed to the program.
fn check_texts(entry: &Entry) -> std::result::Result<(), String> {
    if entry.description.len() > MAX_DESCRIPTION {
        return Err(format!("`description` has more than {MAX_DESCRIPTION} bytes"));
    }
    if entry.description.chars().any(char::is_control) {
        return Err("`description` must be one line".to_owned());
    }
    if entry.args.len() > MAX_ARGS || entry.env.len() > MAX_ENV {
        return Err(format!("more than {MAX_ARGS} `args` or {MAX_ENV} `env` names"));
    }
    if let Some(bad) = entry
        .env
        .iter()
        .find(|name| name.is_empty() || name.contains(['=', '\0']))
    {
        return Err(format!(
            "{bad:?} in `env` is no name of an environment variable; values are not given here"
        ));
    }
    if entry.args.iter().any(|arg| arg.contains('\0')) {
        return Err("an argument holds a NUL character".to_owned());
    }
    Ok(())
}

fn check_retry(entry: &Entry) -> std::result::Result<Retry, String> {
    let Some(attempts) = entry.attempts else {
        if entry.backoff.is_some() || entry.retry_on.is_some() {
            return Err("`backoff` and `retry_on` need `attempts`".to_owned());
        }
        return Ok(Retry::default());
    };
    if !(1..=MAX_ATTEMPTS).contains(&attempts) {
        return Err(format!("`attempts` must be between 1 and {MAX_ATTEMPTS}"));
    }
    if attempts > 1 && entry.effect == Effect::Once {
        return Err("what has the effect `once` is never tried again: leave `attempts` out".to_owned());
    }
    let backoff = entry
        .backoff
        .as_deref()
        .map_or(Ok(DEFAULT_BACKOFF), parse_duration)?;
    if backoff > MAX_BACKOFF {
        return Err("`backoff` must be at most 1h".to_owned());
    }
    let on = entry.retry_on.clone().unwrap_or_default();
    let plain = |code: &String| {
        !code.is_empty()
            && code.len() <= MAX_NAME
            && code
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    if on.len() > MAX_RETRY_ON || entry.retry_on.as_ref().is_some_and(Vec::is_empty) {
        return Err(format!("`retry_on` must name 1 to {MAX_RETRY_ON} error codes"));
    }
    if let Some(bad) = on.iter().find(|code| !plain(code)) {
        return Err(format!(
            "{bad:?} in `retry_on` is no error code, session_lost or failed"
        ));
    }
    Ok(Retry {
        attempts,
        backoff,
        on,
    })
}

fn check_name(name: &str) -> std::result::Result<(), String> {
    let well_formed = name.len() <= MAX_NAME
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-'));
    if well_formed {
        return Ok(());
    }
    Err(format!(
        "{name:?} is no capability name: 1 to {MAX_NAME} of a-z 0-9 . _ -, beginning with a letter"
    ))
}

fn find_program(program: &Path, folder: &Path) -> std::result::Result<PathBuf, String> {
    let shown = program.display();
    let found = if program.is_absolute() {
        program.to_path_buf()
    } else if program.components().count() > 1 {
        folder.join(program)
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path)
            .map(|dir| dir.join(program))
            .find(|candidate| is_executable(candidate));
        found.ok_or_else(|| format!("program {shown} is not in PATH; give its absolute path"))?
    };
    // Links are not resolved: what a program is called may decide what it does (busybox, virtual environments).
    let found = std::path::absolute(&found).map_err(|error| format!("program {shown}: {error}"))?;
    std::fs::metadata(&found).map_err(|error| format!("program {shown}: {error}"))?;
    if !is_executable(&found) {
        return Err(format!(
            "program {shown} is not an executable file; try: chmod +x {}",
            found.display()
        ));
    }
    Ok(found)
}

fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn find_folder(dir: &Path, folder: &Path) -> std::result::Result<PathBuf, String> {
    let found =
        std::fs::canonicalize(folder.join(dir)).map_err(|e| format!("working_dir {}: {e}", dir.display()))?;
    if found.is_dir() {
        Ok(found)
    } else {
        Err(format!("working_dir {} is not a folder", dir.display()))
    }
}

/// Reads `500ms`, `30s`, `5m`, `2h`. Refuses anything else, a number without its unit too.
pub fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    let refuse = || format!("{text:?} is no duration: write a whole number and ms, s, m or h, such as 30s");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(refuse)?;
    let number: u64 = text[..split].parse().map_err(|_| refuse())?;
    let factor = match &text[split..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(refuse()),
    };
    number
        .checked_mul(factor)
        .map(Duration::from_millis)
        .ok_or_else(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str) -> Result<Vec<Capability>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("caps.toml");
        std::fs::write(&path, text).unwrap();
        load(&[path])
    }

    fn refusal(text: &str) -> String {
        let error = load_text(text).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.message
    }

    #[test]
    fn a_full_entry_is_read() {
        let all = load_text(
            "[[capability]]\nname = \"logs.tail\"\nprogram = \"/bin/sh\"\n\
             args = [\"-c\", \"cat\"]\neffect = \"once\"\n\
             timeout = \"5s\"\nconcurrency = 2\nenv = [\"PATH\"]\nlocal_mediation = true\nmax_output = 100\n\
             working_dir = \"/\"\ndescription = \"tail\"\n",
        )
        .unwrap();
        let one = all.last().unwrap();
        assert_eq!(
            (one.name.as_str(), one.effect, one.concurrency),
            ("logs.tail", Effect::Once, 2)
        );
        assert_eq!(
            (one.timeout, one.max_output, one.local_mediation),
            (Duration::from_secs(5), 100, true)
        );
        assert_eq!(all.len(), 4);
    }

    #[test]
    fn refusals_name_file_and_line() {
        let head = "# a comment\n[[capability]]\nname = \"a\"\nprogram = \"/bin/sh\"\neffect = \"once\"\n";
        for (tail, line, word) in [
            ("colour = 1\n", 6, "colour"),
            ("timeout = \"0s\"\n", 2, "timeout"),
            ("timeout = \"5\"\n", 2, "duration"),
            ("timeout = 5\n", 6, "string"),
            ("concurrency = 0\n", 2, "concurrency"),
            ("concurrency = 65\n", 2, "concurrency"),
            ("max_output = 600000\n", 2, "max_output"),
            ("env = [\"A=B\"]\n", 2, "A=B"),
            ("working_dir = \"/nowhere/at/all\"\n", 2, "working_dir"),
            ("queue_limit = 0\n", 2, "queue_limit"),
            ("attempts = 2\n", 2, "once"),
            ("attempts = 0\n", 2, "attempts"),
            ("backoff = \"1s\"\n", 2, "attempts"),
            ("attempts = 1\nbackoff = \"2h\"\n", 2, "backoff"),
            ("attempts = 1\nretry_on = []\n", 2, "retry_on"),
            ("attempts = 1\nretry_on = [\"No!\"]\n", 2, "No!"),
            ("grace = \"31s\"\n", 2, "grace"),
        ] {
            let message = refusal(&format!("{head}{tail}"));
            assert!(
                message.contains(&format!("caps.toml:{line}: ")) && message.contains(word),
                "{message}"
            );
        }
    }

    #[test]
    fn names_programs_and_doubles_are_checked() {
        let entry = |name: &str, program: &str| {
            format!("[[capability]]\nname = \"{name}\"\nprogram = \"{program}\"\neffect = \"idempotent\"\n")
        };
        assert!(refusal(&entry("Upper", "/bin/sh")).contains("no capability name"));
        assert!(refusal(&entry("", "/bin/sh")).contains("no capability name"));
        assert!(refusal(&entry("echo", "/bin/sh")).contains("exists already"));
        assert!(refusal(&entry("a", "/bin/not-there")).contains("not-there"));
        assert!(refusal(&entry("a", "/etc/passwd")).contains("not an executable"));
        assert!(refusal(&entry("a", "no-such-program-anywhere")).contains("PATH"));
        assert!(refusal(&(entry("a", "/bin/sh") + &entry("a", "/bin/sh"))).contains("caps.toml:5: "));
        assert!(refusal("[[capability]]\nname = \"a\"\nprogram = \"/bin/sh\"\n").contains("effect"));
        assert!(load_text(&entry("a", "sh")).is_ok());
    }

    #[test]
    fn a_program_is_relative_to_its_file_and_keeps_its_name() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/bin/sh", dir.path().join("applet")).unwrap();
        let path = dir.path().join("caps.toml");
        let text =
            "[[capability]]\nname = \"a\"\nprogram = \"./applet\"\neffect = \"once\"\nworking_dir = \".\"\n";
        std::fs::write(&path, text).unwrap();
        let Action::Program(program) = load(&[path]).unwrap().pop().unwrap().action else {
            panic!("no program")
        };
        assert_eq!(
            program.path.file_name().unwrap(),
            "applet",
            "a link is what it is called"
        );
        assert_eq!(program.path, dir.path().join("./applet"));
        let folder = std::fs::canonicalize(dir.path()).unwrap();
        assert_eq!(program.working_dir, Some(folder));
    }

    #[test]
    fn too_many_are_refused() {
        let mut text = String::new();
        for number in 0..MAX_CAPABILITIES {
            text +=
                &format!("[[capability]]\nname = \"c{number}\"\nprogram = \"/bin/sh\"\neffect = \"once\"\n");
        }
        assert!(refusal(&text).contains("more than 64"));
    }
}

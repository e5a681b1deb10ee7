//! What is logged, changeable while the daemon runs.

use std::sync::OnceLock;

use thiserror::Error;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// The crate reports the planned end of its workers as an error.
pub(super) const BASE: &str = "vhost_user_backend::handler=off";

/// Bytes of a list of filters, at most.
const LIST: usize = 1024;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The filter of this process.
pub(super) static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Why the level stays as it was.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LevelError {
    /// The text says nothing.
    #[error("{0}")]
    Wrong(String),
    /// There is no log whose level could be changed.
    #[error("the log of this process is not started, or has ended")]
    NoLog,
}

/// Has this logged from now on: a level, or a list of levels and of TARGET=LEVEL.
///
/// # Errors
///
/// When the text is not that, or there is no log. Nothing has changed then.
pub fn set_level(text: &str) -> Result<(), LevelError> {
    let filter = filter(text).map_err(LevelError::Wrong)?;
    let handle = FILTER.get().ok_or(LevelError::NoLog)?;
    // What it is set to may be all that is left of the log.
    tracing::info!(level = text, "the level of the log is set");
    // The `log` crate, by which others log, is told the level as well.
    handle.reload(filter).map_err(|_| LevelError::NoLog)
}

/// Reads a list. `EnvFilter` would take any word for a target of which everything is logged, and
/// then, for want of a level, nothing of all others.
fn filter(text: &str) -> Result<EnvFilter, String> {
    if text.len() > LIST {
        return Err(format!("the list has {} bytes, but {LIST} is the most", text.len()));
    }
    for item in text.split(',') {
        let (target, level) = match item.split_once('=') {
            None => (None, item),
            Some((target, level)) => (Some(target), level),
        };
        if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            let what = if target.is_none() { ", nor TARGET=LEVEL" } else { "" };
            return Err(format!("{level:?} is not a level ({}){what}", LEVELS.join(", ")));
        }
        let is_part = |char: char| char.is_ascii_alphanumeric() || matches!(char, '_' | ':');
        if let Some(target) = target.filter(|name| name.is_empty() || !name.chars().all(is_part)) {
            return Err(format!("{target:?} is not the name of a part of the program"));
        }
    }
    // Of what is there twice, the last counts.
    let list = format!("{BASE},{text}");
    EnvFilter::builder().parse(list).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tracing::level_filters::LevelFilter;

    #[test]
    fn levels_and_lists_are_taken() {
        for (text, most) in [
            ("off", LevelFilter::OFF),
            ("error", LevelFilter::ERROR),
            ("warn", LevelFilter::WARN),
            ("INFO", LevelFilter::INFO),
            ("debug", LevelFilter::DEBUG),
            ("trace", LevelFilter::TRACE),
            ("info,vhost_user_mem::queue=debug", LevelFilter::DEBUG),
            ("vhost_user_mem=warn,error", LevelFilter::WARN),
        ] {
            let filter = filter(text).unwrap();
            assert_eq!(filter.max_level_hint(), Some(most), "{text}");
            assert!(filter.to_string().contains(BASE), "{filter}");
        }
        let all = filter("info,vhost_user_backend::handler=error").unwrap().to_string();
        assert!(!all.contains("=off"), "{all}");
    }

    #[test]
    fn a_word_that_is_not_a_level_is_refused_and_named() {
        for (text, said) in [
            ("inof", "\"inof\" is not a level (off, error,"),
            ("", "\"\" is not a level"),
            ("info,", "\"\" is not a level"),
            ("info, debug", "\" debug\" is not a level"),
            ("3", "\"3\" is not a level"),
            ("vhost_user_mem", "nor TARGET=LEVEL"),
            ("vhost_user_mem=inof", "\"inof\" is not a level"),
            ("a=b=info", "\"b=info\" is not a level"),
            ("=info", "\"\" is not the name"),
            ("[span{field=info", "\"[span{field\" is not the name"),
            ("a-b=info", "\"a-b\" is not the name"),
            ("[a]=info", "\"[a]\" is not the name"),
            ("a\u{e4}=info", "is not the name"),
        ] {
            let error = filter(text).map(|filter| filter.to_string()).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        assert!(filter(&"info,".repeat(LIST)).unwrap_err().contains("is the most"));
    }

    proptest! {
        #[test]
        fn what_is_taken_says_a_level_in_every_part(text in "[a-zA-Z:_=,\\[\\]{}\"/ ]{0,40}|.*") {
            if filter(&text).is_ok() {
                for part in text.split(',') {
                    let level = part.rsplit('=').next().unwrap().to_lowercase();
                    prop_assert!(LEVELS.contains(&level.as_str()), "{text}");
                }
            }
        }
    }
}

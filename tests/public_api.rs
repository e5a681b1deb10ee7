//! What the library crates offer changes on purpose only: it is written down, item by item.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use public_api::Builder;

/// Crates whose users are other projects.
const CRATES: [&str; 4] = ["ram-discard", "vmstate", "virtio-mem", "migration"];

/// Set, the lists are written anew instead of compared.
const UPDATE: &str = "UPDATE_PUBLIC_API";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What rustdoc knows of a crate, as JSON. The toolchain that the repository pins writes it, though not
/// by a stable option.
fn documented(name: &str) -> PathBuf {
    let target = root().join("target/public-api");
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root())
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTDOCFLAGS")
        .args(["rustdoc", "--quiet", "--lib", "--package", name, "--target-dir"])
        .arg(&target)
        .args(["--", "-Z", "unstable-options", "--output-format", "json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.join("doc").join(format!("{}.json", name.replace('-', "_")))
}

fn offered(name: &str) -> Vec<String> {
    let api = Builder::from_rustdoc_json(documented(name))
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()
        .unwrap();
    api.items().map(ToString::to_string).collect()
}

#[test]
fn what_the_crates_offer_is_what_is_written_down() {
    let folder = root().join("spec-notes/public-api");
    let mut differences = String::new();
    for name in CRATES {
        let (file, now) = (folder.join(name).with_extension("txt"), offered(name));
        if env::var_os(UPDATE).is_some() {
            fs::write(&file, now.join("\n") + "\n").unwrap();
            continue;
        }
        let written = fs::read_to_string(&file).unwrap_or_default();
        let written: Vec<&str> = written.lines().collect();
        for item in now.iter().filter(|item| !written.contains(&item.as_str())) {
            differences.push_str(&format!("+ {item}\n"));
        }
        for item in written.iter().filter(|item| !now.iter().any(|now| now == *item)) {
            differences.push_str(&format!("- {item}\n"));
        }
    }
    assert!(
        differences.is_empty(),
        "the public API has changed; if that is on purpose, `{UPDATE}=1 cargo test -p tests --test public_api`:\n{differences}"
    );
}

//! The client of the management API.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmemctl::main()
}

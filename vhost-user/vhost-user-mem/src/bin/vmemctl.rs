//! The client of the management API.

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_user_mem::vmemctl::main()
}

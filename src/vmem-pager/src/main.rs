//! The pager of stock VMMs; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmem_pager::cli::main()
}

//! Links the program as a kernel: at a fixed address, with nothing of the C library.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=link.ld");
    for argument in [
        "-nostartfiles".to_owned(),
        "-nostdlib".to_owned(),
        "-static".to_owned(),
        "-no-pie".to_owned(),
        "-Wl,--build-id=none".to_owned(),
        format!("-Wl,-T,{directory}/link.ld"),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}

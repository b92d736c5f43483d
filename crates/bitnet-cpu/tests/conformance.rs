//! Every instruction set and number of threads gives the bits of the reference.

use bitnet_core::Shortcuts;
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_quant::reference::ReferenceBackend;
use bitnet_testing::conformance::{Tolerance, backend_matches_reference, zeros_match_reference};

fn conforms(isa: Isa) {
    if !Isa::detected().contains(&isa) {
        println!("skipped: this CPU has no {isa}");
        return;
    }
    for threads in [1, 2, 3] {
        let options =
            CpuOptions { threads: Some(threads), isa: Some(isa), ..CpuOptions::default() };
        let backend = CpuBackend::new(options).unwrap();
        backend_matches_reference(&backend, &ReferenceBackend, Tolerance::Exact);
    }
    for (shortcuts, copies) in
        [(Shortcuts::ALL, true), (Shortcuts::NONE, true), (Shortcuts::NONE, false)]
    {
        let options = CpuOptions {
            threads: Some(3),
            isa: Some(isa),
            shortcuts,
            copies,
            ..CpuOptions::default()
        };
        let backend = CpuBackend::new(options).unwrap();
        zeros_match_reference(&backend, &ReferenceBackend, Tolerance::Exact);
    }
}

#[test]
fn scalar_code_gives_the_bits_of_the_reference() {
    conforms(Isa::Scalar);
}

#[test]
fn avx2_gives_the_bits_of_the_reference() {
    conforms(Isa::Avx2);
}

#[test]
fn avxvnni_gives_the_bits_of_the_reference() {
    conforms(Isa::AvxVnni);
}

#[test]
fn avx512_gives_the_bits_of_the_reference() {
    conforms(Isa::Avx512);
}

#[test]
fn neon_gives_the_bits_of_the_reference() {
    conforms(Isa::Neon);
}

//! Checkpoints whose tensors are not those that their description calls for.

use std::path::Path;

use bitnet_core::Tensor;
use bitnet_model::source::{self, Checkpoint};
use bitnet_model::weights::{self, LoadOptions};
use bitnet_quant::reference::ReferenceBackend;

/// What loading the built-in model says after a change.
fn load(change: impl FnOnce(&mut Checkpoint)) -> Result<(), String> {
    let mut checkpoint = source::open(source::TINY).unwrap();
    change(&mut checkpoint);
    let Checkpoint { mut description, tensors } = checkpoint;
    let (config, notes) = (&description.config, &mut description.notes);
    let options = LoadOptions::default();
    weights::load(ReferenceBackend, &description.path, config, &tensors, options, notes)
        .map(drop)
        .map_err(|error| error.to_string())
}

#[test]
fn a_tensor_that_the_architecture_does_not_have_is_refused() {
    let with = |name: &str| {
        load(|checkpoint| {
            let tensor = Tensor::from_f32(vec![1], &[1.0]);
            checkpoint.tensors.insert(Path::new("m"), name.to_owned(), Ok(tensor)).unwrap();
        })
    };
    for name in [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.99.mlp.up_proj.weight",
        "model.norm.bias",
        "model.embed_tokens.weight_scale",
        "lm_head.bias",
        "rope_freqs.weight",
    ] {
        let error = with(name).unwrap_err();
        assert!(error.contains(&format!("`{name}`")) && error.contains("not part"), "{error}");
    }
    with("model.layers.0.self_attn.rotary_emb.inv_freq").unwrap();
}

#[test]
fn a_head_that_is_not_the_embedding_must_be_there() {
    let error = load(|checkpoint| checkpoint.description.config.tied = Some(false)).unwrap_err();
    assert!(error.contains("`lm_head.weight`: is missing"), "{error}");
}

#[test]
fn a_stored_copy_of_a_tied_head_is_no_contradiction() {
    load(|checkpoint| {
        let embedding = checkpoint.tensors.get("model.embed_tokens.weight").unwrap().unwrap();
        let head = embedding.clone();
        checkpoint.tensors.insert(Path::new("m"), "lm_head.weight".to_owned(), Ok(head)).unwrap();
    })
    .unwrap();
}

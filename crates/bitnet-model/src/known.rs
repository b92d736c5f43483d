//! Facts that published files get wrong, and what is right. Each correction leaves a note.
//!
//! Corrections that belong to one architecture (its activation, its norms) stand in `arch`; a
//! missing pre-tokenizer is corrected in `tokenizer`.

/// The template in the `tokenizer_config.json` of microsoft/bitnet-b1.58-2B-4T: the model was
/// trained on this one.
const BITNET_2B_TEMPLATE: &str = "{% set loop_messages = messages %}{% for message in \
    loop_messages %}{% set content = message['role'] | capitalize + ': '+ message['content'] | \
    trim + '<|eot_id|>' %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' \
    }}{% endif %}";

/// The chat template to use for a GGUF file of an architecture, given the one it carries.
///
/// Conversions of BitNet b1.58 2B-4T by its makers carry a template that the model never saw
/// (`Human: ... BITNETAssistant: ` with an end token behind the generation prompt), which makes
/// answers endless (ikawrakow/ik_llama.cpp#339).
pub fn template<'a>(
    architecture: &str,
    stored: Option<&'a str>,
    notes: &mut Vec<String>,
) -> Option<&'a str> {
    let stored = stored?;
    let wrong = matches!(architecture, "bitnet-b1.58" | "bitnet-25" | "bitnet")
        && stored.contains("BITNETAssistant");
    if !wrong {
        return Some(stored);
    }
    notes.push(
        "the file's chat template (`BITNETAssistant`) is not the one the model was trained on: \
         the published `User: ... Assistant:` template is used"
            .to_owned(),
    );
    Some(BITNET_2B_TEMPLATE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endless_template_is_replaced_and_others_are_kept() {
        let mut notes = Vec::new();
        let endless = "{{ 'Human: ' }}{{ 'BITNETAssistant: ' }}";
        assert_eq!(template("bitnet-b1.58", Some(endless), &mut notes), Some(BITNET_2B_TEMPLATE));
        assert_eq!(notes.len(), 1);
        assert_eq!(template("llama", Some(endless), &mut notes), Some(endless));
        assert_eq!(template("bitnet-b1.58", Some("{{ x }}"), &mut notes), Some("{{ x }}"));
        assert_eq!(template("bitnet-b1.58", None, &mut notes), None);
        assert_eq!(notes.len(), 1);
    }

    #[test]
    fn the_published_template_is_the_one_of_the_golden_conversations() {
        let Some(path) = bitnet_testing::golden("chat.json") else { return };
        let text = std::fs::read_to_string(path).unwrap();
        let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(golden["templates"]["bitnet"], BITNET_2B_TEMPLATE);
    }
}

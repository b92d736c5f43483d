//! Chat templates against Hugging Face's `apply_chat_template`.

use bitnet_model::chat::{ChatError, ChatTemplate, Message};
use bitnet_model::tokenizer::{Special, Tokenizer, TokenizerConfig};
use bitnet_testing::golden;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Golden {
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    name: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
    ids: Vec<u32>,
    ids_of_text_with_bos_added: Vec<u32>,
}

fn golden_cases() -> Option<Golden> {
    let golden: Golden =
        serde_json::from_slice(&std::fs::read(golden("chat.json")?).unwrap()).unwrap();
    assert_eq!((golden.templates.len(), golden.cases.len()), (2, 60));
    Some(golden)
}

fn golden_config() -> Option<TokenizerConfig> {
    let config = std::fs::read(golden("bitnet-bf16/tokenizer_config.json")?).unwrap();
    Some(TokenizerConfig::from_json(Some(&config), None).unwrap())
}

fn golden_tokenizer() -> Option<Tokenizer> {
    let bytes = std::fs::read(golden("tokenizer/tokenizer.json")?).unwrap();
    Some(Tokenizer::from_json(&bytes, &golden_config()?).unwrap())
}

#[test]
fn every_golden_conversation_renders_and_encodes_as_the_reference_does() {
    let (Some(Golden { templates, cases }), Some(tokenizer)) = (golden_cases(), golden_tokenizer())
    else {
        return;
    };
    for case in &cases {
        let what = format!("{}, {}, {}", case.template, case.name, case.add_generation_prompt);
        let template = ChatTemplate::new(&templates[&case.template]).unwrap();
        let prompt = case.add_generation_prompt;
        let text = template.render(&tokenizer, &case.messages, prompt).unwrap();
        assert_eq!(text, case.text, "{what}");

        let ids = tokenizer.encode(&text, false, Special::Recognised).unwrap();
        assert_eq!(ids, case.ids, "{what}");
        let ids = tokenizer.encode(&text, true, Special::Recognised).unwrap();
        assert_eq!(ids, case.ids_of_text_with_bos_added, "{what}");
    }
}

#[test]
fn an_encoded_conversation_begins_with_exactly_one_begin_token() {
    let (Some(Golden { templates, cases }), Some(tokenizer)) = (golden_cases(), golden_tokenizer())
    else {
        return;
    };
    let bos = tokenizer.bos().unwrap();
    for case in &cases {
        let template = ChatTemplate::new(&templates[&case.template]).unwrap();
        let (text, ids) =
            template.encode(&tokenizer, &case.messages, case.add_generation_prompt).unwrap();
        assert_eq!(text, case.text);
        // The Llama-3 template writes the begin token, the BitNet one leaves it to the tokenizer.
        let expected = match case.template.as_str() {
            "llama3" => &case.ids,
            _ => &case.ids_of_text_with_bos_added,
        };
        assert_eq!(&ids, expected, "{}", case.name);
        assert_eq!(ids[0], bos);
        assert_ne!(ids[1], bos);
    }
}

/// Renders a source for the golden tokenizer and one user message.
fn render(source: &str) -> Option<Result<String, ChatError>> {
    let tokenizer = golden_tokenizer()?;
    let messages = [Message::new("user", "<b>\"it's\" & é\\u003c</b>\n")];
    Some(
        ChatTemplate::new(source).and_then(|template| template.render(&tokenizer, &messages, true)),
    )
}

#[test]
fn the_configuration_gives_the_template_as_text_or_as_a_named_list() {
    let (Some(Golden { templates, cases }), Some(config), Some(tokenizer)) =
        (golden_cases(), golden_config(), golden_tokenizer())
    else {
        return;
    };
    let case = &cases[1];
    let text = config.chat_template.unwrap();
    let list = json!([
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": templates["bitnet"]},
    ]);
    for entry in [text, list] {
        let template = ChatTemplate::from_entry(&entry).unwrap();
        let text = template.render(&tokenizer, &case.messages, case.add_generation_prompt);
        assert_eq!(text.unwrap(), case.text);
    }
    for entry in [json!([]), json!(3), json!([{"name": "rag", "template": "x"}])] {
        let error = ChatTemplate::from_entry(&entry).unwrap_err();
        assert!(error.to_string().contains("`default`"), "{error}");
    }
}

#[test]
fn tojson_writes_what_python_writes() {
    // Expected by Python 3: json.dumps(message, ensure_ascii=False), and with indent=2.
    let content = r#""<b>\"it's\" & é\\u003c</b>\n""#;
    let Some(text) = render("{{ messages[0] | tojson }}") else { return };
    assert_eq!(text.unwrap(), format!(r#"{{"role": "user", "content": {content}}}"#));
    for source in ["{{ messages | tojson(indent=2) }}", "{{ messages | tojson(2) }}"] {
        assert_eq!(
            render(source).unwrap().unwrap(),
            format!("[\n  {{\n    \"role\": \"user\",\n    \"content\": {content}\n  }}\n]")
        );
    }
    let plain = "{{ {'a': [1, 2.5, none, true], 'e': {}} | tojson(ensure_ascii=false) }}";
    assert_eq!(render(plain).unwrap().unwrap(), r#"{"a": [1, 2.5, null, true], "e": {}}"#);
    assert!(render("{{ 'é' | tojson(ensure_ascii=true) }}").unwrap().is_err());
}

#[test]
fn templates_have_the_surroundings_that_hugging_face_gives_them() {
    // Expected by transformers' documentation and Jinja's rules for trim_blocks, lstrip_blocks.
    let cases = [
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
        ("{{ bos_token }}|{{ eos_token }}", "<|begin_of_text|>|<|eot_id|>"),
        ("{{ tools is none }} {{ documents is none }} {{ nothing is defined }}", "True True False"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i == 3 %}{% break %}{% endif %}{% endfor %}",
            "023",
        ),
        ("{{ ' a b '.strip().upper().split(' ')[1] }}{{ messages[0].items() | length }}", "B2"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{{ messages[0]['content'][3:7] }}{{ messages[-1].role }}", "\"it'user"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("a {%- generation -%} x {%- endgeneration %} b{% if 1 %}{% endif %}", "ax b"),
    ];
    for (source, expected) in cases {
        let Some(text) = render(source) else { return };
        assert_eq!(text.as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn a_refusal_is_the_templates_own_message() {
    let Some(result) = render("{{ raise_exception('Roles must alternate.') }}") else { return };
    assert_eq!(result, Err(ChatError::Refused("Roles must alternate.".into())));
    assert_eq!(
        result.unwrap_err().to_string(),
        "the chat template refuses this conversation: Roles must alternate."
    );
}

#[test]
fn a_template_that_cannot_be_compiled_or_run_is_one_sentence() {
    let Some(error) = render("line one\n{% if %}") else { return };
    let message = error.unwrap_err().to_string();
    assert!(message.starts_with("the chat template cannot be used: syntax error"), "{message}");
    assert!(message.contains("chat template:2") && !message.contains('\n'), "{message}");
    for source in ["{{ nothing.at_all }}", "{{ 1 + 'a' }}", "{{ messages[0].nothing() }}"] {
        let error = render(source).unwrap().unwrap_err();
        assert!(matches!(error, ChatError::Rendering(_)), "{error}");
        assert!(!error.to_string().contains('\n'));
    }
}

#[test]
fn a_template_that_never_ends_or_writes_too_much_is_stopped() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let Some(result) = render(loops) else { return };
    let message = result.unwrap_err().to_string();
    assert!(message.contains("ran out of fuel"), "{message}");

    let writes = "{% set x = 'x' * 100000 %}{% for a in range(9999) %}{{ x }}{% endfor %}";
    let message = render(writes).unwrap().unwrap_err().to_string();
    assert!(message.contains("wrote more than 67108864 bytes"), "{message}");

    let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(render(recursion).unwrap().is_err());
    assert!(render(&"(".repeat(100_000)).unwrap().is_ok(), "text is not code");
    assert!(render(&format!("{{{{ {} }}}}", "(".repeat(100_000))).unwrap().is_err());
    let message = render(&"x".repeat((1 << 20) + 1)).unwrap().unwrap_err().to_string();
    assert!(message.contains("1048577 bytes"), "{message}");
}

#[test]
fn a_long_conversation_has_fuel_enough() {
    let (Some(Golden { templates, .. }), Some(tokenizer)) = (golden_cases(), golden_tokenizer())
    else {
        return;
    };
    let template = ChatTemplate::new(&templates["llama3"]).unwrap();
    let messages = vec![Message::new("user", "hi"); 20_000];
    let text = template.render(&tokenizer, &messages, true).unwrap();
    assert_eq!(text.matches("hi<|eot_id|>").count(), 20_000);
}

#[test]
fn a_message_with_an_unknown_field_is_refused() {
    let message = json!({"role": "user", "content": "hi", "images": []});
    assert!(serde_json::from_value::<Message>(message).is_err());
}

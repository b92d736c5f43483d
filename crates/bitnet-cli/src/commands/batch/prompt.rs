//! From the fields of a row to its prompt.

use std::collections::BTreeSet;

use anyhow::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};

use super::super::WrongUsage;
use super::input::{Fields, PROMPT};

/// The name that error messages show.
const NAME: &str = "--template";

/// Steps that a template may take for a row: one that never ends must not stop the others.
const FUEL: u64 = 1_000_000;

/// Makes the prompts.
pub struct Template {
    environment: Environment<'static>,
    /// The fields that it uses.
    fields: BTreeSet<String>,
}

impl Template {
    /// Without a source the prompt is the field [`PROMPT`].
    pub fn new(source: Option<&str>) -> Result<Self> {
        let field;
        let source = match source {
            Some(source) => source,
            None => {
                field = format!("{{{{ {PROMPT} }}}}");
                &field
            }
        };
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_fuel(Some(FUEL));
        let wrong = |reason: String| WrongUsage(format!("{NAME}: {reason}"));
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| wrong(first_line(&error)))?;
        let template = environment.get_template(NAME).expect("it was just added");
        let mut fields: BTreeSet<String> =
            template.undeclared_variables(false).into_iter().collect();
        environment.globals().for_each(|(name, _)| {
            fields.remove(name);
        });
        if fields.is_empty() {
            let sentence = "uses no field, and all prompts would be the same: write a field as \
                            {{ prompt }}, in two pairs of braces";
            return Err(wrong(sentence.to_owned()).into());
        }
        Ok(Template { environment, fields })
    }

    /// Refuses columns that lack a field.
    pub fn check(&self, name: &str, columns: &[String]) -> Result<()> {
        let Some(field) = self.fields.iter().find(|field| !columns.contains(field)) else {
            return Ok(());
        };
        Err(WrongUsage(format!(
            "{name}: has no column `{field}` for the prompt, but {}: see --template",
            columns.join(", ")
        ))
        .into())
    }

    /// The prompt of a row, or why there is none.
    pub fn render(&self, fields: &Fields) -> Result<String, String> {
        let template = self.environment.get_template(NAME).expect("it was added at the beginning");
        template.render(Serde(fields)).map_err(|error| {
            match self.fields.iter().find(|field| !fields.contains_key(*field)) {
                Some(field) => format!("has no field `{field}` for the prompt"),
                None => format!("the template failed: {}", first_line(&error)),
            }
        })
    }
}

fn first_line(error: &minijinja::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: serde_json::Value) -> Fields {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn prompts_are_made_of_fields() {
        let template = Template::new(Some("{{ a }} & {{ b }}{% if c is defined %}!{% endif %}"));
        let template = template.unwrap();
        assert_eq!(template.render(&fields(json!({"a": 1, "b": "<x>"}))).unwrap(), "1 & <x>");
        assert_eq!(template.render(&fields(json!({"a": 1, "b": 2, "c": 3}))).unwrap(), "1 & 2!");
        let missing = template.render(&fields(json!({"a": 1, "c": 2}))).unwrap_err();
        assert_eq!(missing, "has no field `b` for the prompt");
        let plain = Template::new(None).unwrap();
        assert_eq!(plain.render(&fields(json!({"prompt": "x\n"}))).unwrap(), "x\n");
    }

    #[test]
    fn templates_that_cannot_be_meant_are_refused() {
        for source in ["Summarise {title}", "{{ title", "{% for x in %}"] {
            assert!(Template::new(Some(source)).is_err(), "{source}");
        }
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ x }}{% endfor %}\
                       {% endfor %}";
        let endless = Template::new(Some(endless)).unwrap();
        assert!(endless.render(&fields(json!({"x": ""}))).is_err());
        let columns = ["text".to_owned()];
        assert!(Template::new(None).unwrap().check("in.csv", &columns).is_err());
    }
}

//! The records of templates.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{bad, from_json, layers, optional_id, time, to_json};
use crate::domain::{Id, LayerId, Template, TemplateId};

const COLUMNS: &str = "id, name, source, status, settings, layers, content, created_at, owner";

pub fn insert(connection: &mut Connection, template: &Template) -> rusqlite::Result<bool> {
    let sql = format!(
        "INSERT INTO templates ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) \
         ON CONFLICT DO NOTHING"
    );
    write(connection, &sql, template).map(|(inserted, _)| inserted)
}

/// Replaces a record; `None` if there is none.
pub fn update(
    connection: &mut Connection,
    template: &Template,
) -> rusqlite::Result<Option<Vec<LayerId>>> {
    let sql = "UPDATE templates SET name = ?2, source = ?3, status = ?4, settings = ?5, \
               layers = ?6, content = ?7, created_at = ?8, owner = ?9 WHERE id = ?1";
    let (updated, released) = write(connection, sql, template)?;
    Ok(updated.then_some(released))
}

fn write(
    connection: &mut Connection,
    sql: &str,
    template: &Template,
) -> rusqlite::Result<(bool, Vec<LayerId>)> {
    let id = template.id.as_str();
    let held = template.layers.all().cloned().collect();
    let content = template.content.as_ref().map(to_json).transpose()?;
    layers::change(connection, id, held, |transaction| {
        let changed = transaction.execute(
            sql,
            params![
                id,
                template.name,
                to_json(&template.source)?,
                to_json(&template.status)?,
                to_json(&template.settings)?,
                to_json(&template.layers)?,
                content,
                template.created_at.as_microsecond(),
                template.owner.as_ref().map(Id::as_str),
            ],
        )?;
        Ok(changed == 1)
    })
}

pub fn find(connection: &Connection, name: &str) -> rusqlite::Result<Option<Template>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM templates WHERE name = ?1"))?
        .query_row([name], read)
        .optional()
}

pub fn list(connection: &Connection) -> rusqlite::Result<Vec<Template>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM templates ORDER BY name"))?
        .query_map([], read)?
        .collect()
}

pub fn remove(connection: &mut Connection, id: &TemplateId) -> rusqlite::Result<Vec<LayerId>> {
    let id = id.as_str();
    layers::change(connection, id, BTreeSet::new(), |transaction| {
        let removed = transaction.execute("DELETE FROM templates WHERE id = ?1", [id])?;
        Ok(removed == 1)
    })
    .map(|(_, released)| released)
}

fn read(row: &Row<'_>) -> rusqlite::Result<Template> {
    let id: String = row.get(0)?;
    let content: Option<String> = row.get(6)?;
    Ok(Template {
        id: id.parse().map_err(|error| bad(0, Box::new(error)))?,
        name: row.get(1)?,
        source: from_json(row, 2)?,
        status: from_json(row, 3)?,
        settings: from_json(row, 4)?,
        layers: from_json(row, 5)?,
        content: content.map(|_| from_json(row, 6)).transpose()?,
        created_at: time(7, row.get(7)?)?,
        owner: optional_id(row, 8)?,
    })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::SqliteStore;
    use super::*;
    use crate::domain::{
        Layers, Readiness, Settings, Source, Store, TemplateContent, TemplateStatus, UserId,
    };

    fn template(name: &str) -> Template {
        let layers = Layers {
            memory: Vec::new(),
            disk: vec![LayerId::random(), LayerId::random()],
        };
        Template {
            id: TemplateId::random(),
            owner: Some(UserId::random()),
            name: name.into(),
            source: Source::Recipe {
                base: "minimal".into(),
            },
            status: TemplateStatus::Building,
            settings: Settings {
                vcpus: Some(2),
                readiness: Some(Readiness {
                    argv: vec!["true".into()],
                    timeout_sec: 3,
                }),
                env: [("A".to_owned(), "b".to_owned())].into(),
                ..Settings::default()
            },
            layers,
            content: None,
            created_at: Timestamp::from_microsecond(5).unwrap(),
        }
    }

    #[tokio::test]
    async fn a_template_is_read_as_it_was_written_and_holds_its_layers() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let mut first = template("one");
        assert!(store.insert_template(&first).await.unwrap());
        let mut same_name = template("one");
        assert!(!store.insert_template(&same_name).await.unwrap());
        assert_eq!(store.update_template(&same_name).await.unwrap(), None);
        let held = first.layers.all().cloned().collect();
        assert_eq!(store.held_layers().await.unwrap(), held);

        first.status = TemplateStatus::Ready;
        first.content = Some(TemplateContent {
            digest: Some("c0ffee".into()),
            size_bytes: 7,
            disk_bytes: 8,
        });
        assert_eq!(store.update_template(&first).await.unwrap(), Some(vec![]));
        let found = store.find_template("one").await.unwrap();
        assert_eq!(found, Some(first.clone()));
        assert_eq!(store.find_template("two").await.unwrap(), None);

        same_name.name = "another".into();
        same_name.layers.disk[0] = first.layers.disk[0].clone();
        assert!(store.insert_template(&same_name).await.unwrap());
        let all = store.list_templates().await.unwrap();
        assert_eq!(all, [same_name.clone(), first.clone()]);
        let failed = TemplateStatus::Failed { reason: "x".into() };
        let last = same_name.layers.disk[1].clone();
        same_name.status = failed;
        same_name.layers = Layers::default();
        let released = store.update_template(&same_name).await.unwrap();
        assert_eq!(
            released,
            Some(vec![last]),
            "the other one is the first's too"
        );
        let mut released = store.remove_template(&first.id).await.unwrap();
        released.sort();
        first.layers.disk.sort();
        assert_eq!(released, first.layers.disk);
        assert_eq!(store.remove_template(&first.id).await.unwrap(), []);
    }
}

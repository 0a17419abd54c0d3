//! Templates, built in guests from a sandbox, a recipe and an OCI image, and used.

use std::fs;
use std::path::Path;

use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::report;
use serde_json::{Value, json};

fn small(template: &str) -> Value {
    json!({"template": template, "memory_mb": 192})
}

/// Builds a template by the command line.
fn build(daemon: &Daemon, arguments: &[&str]) -> Value {
    let arguments = [&["build", "--json", "--memory-mb", "192"], arguments].concat();
    let (status, out, err) = daemon.template(&arguments);
    assert_eq!(status, Some(0), "{arguments:?}: {err}");
    report(&err);
    let template: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(template["status"], "ready", "{template}");
    assert_eq!(template["digest"].as_str().unwrap().len(), 64);
    template
}

/// A file of a sandbox, here.
fn fetch(sandbox: &Sandbox<'_>, from: &str, to: &Path) {
    let answer = sandbox.download(from);
    assert_eq!(answer.status, 200);
    fs::write(to, answer.bytes()).unwrap();
}

#[test]
fn templates_of_a_sandbox_and_of_a_recipe_are_used() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small("minimal"));
    // What the guest has in memory alone belongs to it, too.
    sandbox.must("mkdir -p /srv/data && head -c 300000 /dev/urandom >/srv/data/file");
    let content = sandbox.must("sha256sum </srv/data/file");
    let copied = build(&daemon, &["copied", "--sandbox", &sandbox.id]);
    assert_eq!(copied["source"]["sandbox_id"], *sandbox.id);
    assert_eq!(
        sandbox.must("sha256sum </srv/data/file"),
        content,
        "it goes on"
    );
    sandbox.delete();

    let clone = daemon.create(&small("copied"));
    assert_eq!(clone.must("sha256sum </srv/data/file"), content);
    assert_eq!(clone.must("cat /proc/sys/kernel/hostname"), clone.id);
    // The disk was left in order.
    assert_eq!(
        clone.must("dmesg | grep -c 'recovering journal' || true"),
        "0"
    );
    let delete = ("DELETE", "/v1/templates/copied", "");
    daemon.refused(delete, (409, "conflict"), &["in use", &clone.id]);
    clone.delete();

    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("app")).unwrap();
    fs::write(
        dir.path().join("app/run"),
        "#!/bin/sh\necho \"app: $GREETING\"\n",
    )
    .unwrap();
    let recipe = dir.path().join("recipe.toml");
    fs::write(
        &recipe,
        "base = 'copied'\n\
         cwd = '/srv/app'\n\
         env = { GREETING = 'hello' }\n\
         readiness = { cmd = ['sh', '-c', 'test -e /tmp/up || { touch /tmp/up; false; }'] }\n\
         [[files]]\nfrom = 'app'\nto = '/srv/app'\nmode = '0755'\n\
         [[steps]]\nrun = 'sha256sum </srv/data/file >sum; id -u >who'\n\
         [[steps]]\nrun = './run | tee -a who'\n",
    )
    .unwrap();
    let recipe = recipe.to_str().unwrap();
    let mine = build(&daemon, &["mine", "--recipe", recipe]);
    assert_ne!(mine["digest"], copied["digest"]);
    // What it needs of its base it has itself.
    assert_eq!(daemon.call("DELETE", "/v1/templates/copied", "").0, 204);
    let mut daemon = daemon.crash();
    let used = daemon.create(&json!({"template": "mine"}));
    assert_eq!(used.get()["memory_mb"], 192);
    assert!(used.get()["timings_ms"]["readiness"].as_f64().unwrap() > 0.0);
    assert_eq!(
        used.must("pwd; cat who; ./run"),
        "/srv/app\n0\napp: hello\napp: hello"
    );
    assert_eq!(used.must("cat sum"), content);
    used.delete();
    let (status, list, _) = daemon.template(&["list"]);
    assert_eq!(status, Some(0));
    assert!(
        list.contains("recipe on copied") && list.contains("minimal"),
        "{list}"
    );
    let (status, _, err) = daemon.template(&["delete", "mine"]);
    assert_eq!(status, Some(0), "{err}");
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
    daemon.stop();
}

/// Makes the archive of an image of two layers, of programs that are there. The second one removes a
/// file and a directory's content, replaces a directory by a link that leads out of any root but the
/// image's, and writes through another such link.
const IMAGE: &str = r#"
set -e
mkdir -p /root/one/bin /root/one/etc /root/one/usr/lib /root/one/gone /root/one/var/full /root/two
cd /root/one
for program in sh cat ls stat; do cp -L "$(command -v $program)" bin/; done
for library in $(ldd bin/* | grep -o '/[^ ]*' | sort -u); do
    [ -e "$library" ] && mkdir -p ".$(dirname $library)" && cp -L "$library" ".$library"
done
echo root:x:0:0::/:/bin/sh >etc/passwd
echo kept >etc/kept; ln etc/kept etc/linked; echo gone >etc/gone; echo full >var/full/file
ln -s /etc abs; ln -s ../../../../etc usr/up
chown 1234:4321 etc/kept; chmod 4750 etc/kept
mkdir -p /root/two/etc /root/two/var/full /root/two/abs
cd /root/two
touch .wh.gone etc/.wh.gone var/full/.wh..wh..opq; echo new >var/full/new
mkdir -p usr; ln -s /etc usr/lib2
cd /root
tar -C one --xattrs -cf one.tar .
tar -C two -cf two.tar --exclude=./abs . && printf through >through
tar -rf two.tar --transform 's,^through$,abs/through,' through
gzip -c two.tar >two.tar.gz
mkdir -p image/blobs/sha256
sum() { sha256sum <"$1" | cut -d' ' -f1; }
put() { cp "$1" "image/blobs/sha256/$(sum "$1")"; printf '{"mediaType":"%s","digest":"sha256:%s","size":%s}' \
    "$2" "$(sum "$1")" "$(stat -c %s "$1")"; }
v=application/vnd.oci.image
printf '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin","FROM=image"],"WorkingDir":"/etc",
  "User":"1234","Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s","sha256:%s"]}}' \
  "$(sum one.tar)" "$(sum two.tar)" >config
printf '{"schemaVersion":2,"config":%s,"layers":[%s,%s]}' "$(put config $v.config.v1+json)" \
  "$(put one.tar $v.layer.v1.tar)" "$(put two.tar.gz $v.layer.v1.tar+gzip)" >manifest
printf '{"schemaVersion":2,"manifests":[%s]}' "$(put manifest $v.manifest.v1+json)" >image/index.json
printf '{"imageLayoutVersion":"1.0.0"}' >image/oci-layout
tar -C image -cf image.tar .
"#;

#[test]
fn an_oci_image_becomes_a_template_that_boots() {
    let daemon = Daemon::start();
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("image.tar"), dir.path().join("bad.tar"));
    let sandbox = daemon.create(&small("minimal"));
    sandbox.must(IMAGE);
    fetch(&sandbox, "/root/image.tar", &good);
    // The same with a layer that is not what its digest says.
    sandbox.must(
        "cd /root/image/blobs/sha256 && f=$(ls -S | head -n 1) && printf x | dd of=$f bs=1 \
         seek=$(($(stat -c %s $f) - 1)) conv=notrunc && tar -C /root/image -cf /root/bad.tar .",
    );
    fetch(&sandbox, "/root/bad.tar", &bad);
    sandbox.delete();

    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());
    let size = ["--disk-mb", "64", "--memory-mb", "192"];
    let arguments = [&["build", "bad", "--oci", bad][..], &size].concat();
    let (status, _, err) = daemon.template(&arguments);
    assert_eq!(status, Some(1), "{err}");
    assert!(err.contains("is not what its digest says"), "{err}");
    let image = build(&daemon, &["image", "--oci", good, "--disk-mb", "64"]);
    assert_eq!(
        (&image["disk_mb"], &image["cwd"]),
        (&json!(64), &json!("/etc"))
    );
    assert_eq!(
        (&image["user"], &image["cmd"]),
        (&json!("1234"), &json!(["sh"]))
    );
    assert!(
        image["source"]["image"]
            .as_str()
            .unwrap()
            .starts_with("sha256:")
    );

    let used = daemon.create(&json!({"template": "image"}));
    assert_eq!(
        used.must("echo $FROM; cat kept; stat -c '%u %g %a %h' kept"),
        "image\nkept\n1234 4321 4750 2"
    );
    // What was removed is, and no more; links led nowhere but into the image.
    let there = used.must("for f in /gone /etc/gone /var/full/file /var/full/new /etc/linked \
                           /etc/through /.builder; do test -e $f && echo $f; done; cat /etc/through");
    assert_eq!(there, "/var/full/new\n/etc/linked\n/etc/through\nthrough");
    assert_eq!(
        used.must("cd /; echo [a-z]*"),
        "abs bin dev etc lib lib64 lost+found proc run sys tmp usr var"
    );
    used.delete();
    assert_eq!(daemon.call("DELETE", "/v1/templates/image", "").0, 204);
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

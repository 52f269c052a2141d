;; Judges histories of `jepsen run` with the original Jepsen's own checkers.
;; It is a project of its own: nothing of Palyra depends on it, and it needs Clojars and Maven Central.
(defproject palyra-history "0.1.0"
  :description "Knossos and Elle on histories of Palyra's fault harness"
  :license {:name "Apache-2.0"}
  :main palyra.check
  ;; Elle up to 0.2.7 can wait for itself forever where there is one processor: its tasks need several threads.
  :jvm-opts ["-Xmx4g" "-Djava.awt.headless=true" "-XX:ActiveProcessorCount=8"]
  ;; Jepsen brings knossos, elle and jepsen.history in versions that fit each other.
  :dependencies [[org.clojure/clojure "1.11.3"]
                 [jepsen "0.3.5"]])

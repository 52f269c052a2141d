(ns palyra.check
  "Reads the EDN that `jepsen run` leaves in a run's folder, and asks knossos and elle what they think of it.

  Each register has a file of its own, independent/KEY/history.edn, with bare values: that is what knossos' models want. For
  elle the same operations become transactions of one micro-operation each, in which reads and writes of registers are told
  by unique values."
  (:require [clojure.edn :as edn]
            [clojure.java.io :as io]
            [clojure.pprint :refer [pprint]]
            [elle.rw-register :as rw]
            [jepsen.history :as h]
            [knossos.competition :as competition]
            [knossos.model :as model])
  (:import (java.io PushbackReader))
  (:gen-class))

(defn ops
  "All op maps of a file."
  [file]
  (with-open [in (PushbackReader. (io/reader file))]
    (->> (repeatedly #(edn/read {:eof ::end} in))
         (take-while #(not= ::end %))
         vec)))

(defn registers
  "The files of single registers, by key."
  [run]
  (for [folder (sort (.listFiles (io/file run "independent")))
        :let [file (io/file folder "history.edn")]
        :when (.exists file)]
    [(.getName folder) file]))

(defn linearizable
  "What knossos says of one register: {:valid? true, false or :unknown}."
  [file]
  (competition/analysis (model/cas-register nil) (h/history (ops file))))

(defn transactions
  "Reads and writes of all registers as transactions. A cas is not among what this checker of elle knows: it is left out, and
  with it the whole register."
  [run]
  (->> (registers run)
       (mapcat (fn [[k file]]
                 (let [all (ops file)]
                   (when-not (some #(= :cas (:f %)) all)
                     (for [op all]
                       (assoc op
                              :key k
                              :f :txn
                              :value [[(if (= :read (:f op)) :r :w) k (:value op)]]))))))
       (sort-by (juxt :time :index))
       (map-indexed (fn [i op] (assoc op :index i)))
       vec))

(defn -main
  "lein run RUN-FOLDER [knossos|elle]"
  [run & [which]]
  (let [knossos (when-not (= which "elle")
                  (into {} (for [[k file] (registers run)]
                             (do (println "knossos:" k)
                                 [k (select-keys (linearizable file) [:valid? :op :final-paths])]))))
        elle    (when-not (= which "knossos")
                  (println "elle")
                  (rw/check {:linearizable-keys? true, :consistency-models [:strict-serializable]}
                            (h/history (transactions run))))
        valid?  (reduce (fn [sum r] (cond (false? (:valid? r)) false
                                          (= :unknown (:valid? r)) (if (false? sum) false :unknown)
                                          :else sum))
                        true
                        (concat (vals knossos) (when elle [elle])))]
    (pprint {:valid? valid?, :knossos knossos, :elle elle})
    (shutdown-agents)
    (System/exit (case valid? true 0, false 1, 2))))
